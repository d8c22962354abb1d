from __future__ import annotations

import pytest

from tersor.report.templates import Markup, number, signed, table, tag


def test_text_and_attributes_are_escaped():
    assert tag("p", "<b>&", title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;&amp;</p>'
    assert tag("p", tag("b", "x")) == "<p><b>x</b></p>", "what is markup already stays"


def test_names_of_attributes():
    assert tag("a", class_="k", aria_label="l", id=None) == '<a class="k" aria-label="l"></a>'
    assert tag("img", src="x") == '<img src="x">'


def test_a_table_scrolls_in_its_own_box_and_has_heads():
    drawn = table(["", "<x>"], [["a&b", "1"], [Markup("<td>c</td>"), tag("td", "2", class_="k")]], caption="t")
    assert drawn.startswith('<div class="scroll" tabindex="0" role="region" aria-label="t"><table><caption>t</caption>')
    assert '<th scope="col">&lt;x&gt;</th>' in drawn
    assert '<th scope="row">a&amp;b</th><td>1</td>' in drawn
    assert '<th scope="row">c</th><td class="k">2</td>' in drawn


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.25446, "0.254"), (1234.5, "1,234"), (None, "–"), (0.0, "0"), (48.61, "48.6"), (0.00004, "0.0000400")],
)
def test_three_digits(value, told):
    assert number(value) == told


@pytest.mark.parametrize(("value", "told"), [(0.5, "+0.50 points"), (-1.234, "−1.23 points"), (-0.004, "±0 points")])
def test_differences_have_a_sign(value, told):
    assert signed(value, " points") == told
