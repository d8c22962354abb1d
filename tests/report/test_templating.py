from __future__ import annotations

import pytest
from jinja2 import UndefinedError
from samples import one_line

from tersor.report.templating import environment, fixed, inline_png, number, signed


def rendered(source, **values):
    return one_line(environment().from_string(source).render(values))


def test_text_and_attributes_are_escaped():
    assert rendered('<p title="{{ a }}">{{ b }}</p>', a='"x"', b="<b>&") == '<p title="&#34;x&#34;">&lt;b&gt;&amp;</p>'


def test_an_undefined_name_raises():
    with pytest.raises(UndefinedError):
        rendered("{{ nothing }}")


def test_a_table_has_headers_and_scrolls_in_its_own_box():
    table = rendered(
        '{% from "tables.html" import row, table %}'
        '{% call table("t", ["", "<x>"]) %}{{ row("a&b", [1]) }}'
        '{% call row("c", []) %}<td class="k">2</td>{% endcall %}{% endcall %}'
    )
    assert table.startswith('<div class="scroll" tabindex="0" role="region" aria-label="t"><table><caption>t</caption>')
    assert '<th scope="col">&lt;x&gt;</th>' in table
    assert '<th scope="row">a&amp;b</th><td>1</td>' in table
    assert '<th scope="row">c</th><td class="k">2</td>' in table


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.25446, "0.254"), (1234.5, "1,234"), (None, "–"), (0.0, "0"), (48.61, "48.6"), (0.00004, "0.0000400")],
)
def test_numbers_have_three_significant_digits(value, expected):
    assert number(value) == expected


def test_numbers_can_be_divided_by_a_unit():
    assert number(2_500_000, unit=1e6) == "2.50"
    assert fixed(2_500_000, 1, unit=1e6) == "2.5"
    assert fixed(None, 1) == "–"


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, "+0.50 points"), (-1.234, "−1.23 points"), (-0.004, "±0 points")]
)
def test_differences_have_a_sign(value, expected):
    assert signed(value, " points") == expected


def test_only_inline_pictures_are_accepted():
    assert inline_png("data:image/png;base64,AA") == "data:image/png;base64,AA"
    with pytest.raises(ValueError, match="not an inline PNG"):
        inline_png("https://elsewhere/x.png")
