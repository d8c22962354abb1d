"""With any content of numbers and evidence, the page has only its usual elements and attributes, and loads nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from samples import evidence_of, numbers_of

from tersor.core.errors import InputError
from tersor.report.page import write_report

HOSTILE = (
    "</title></style></svg></td><script>alert(1)</script><img src=x onerror=alert(1)>",
    '" onload="alert(1)" x=\'y',
    "' onload='alert(1)",
    "<th onclick=alert(1)>",
    "<td><script>",
    "\u2028\u2029\x00\ud800${style}$body]]>--><!--",
    "javascript:alert(1)",
)


class Page(HTMLParser):
    """Elements and their attributes, and what the page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[tuple[str, str]] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements |= {(tag, "")} | {(tag, name) for name, _ in attrs}
        self.loaded |= {value for name, value in attrs if name in {"src", "href", "action", "xlink:href"}}

    def handle_comment(self, data):
        self.elements.add(("comment", ""))


def page_of(folder, numbers, evidence) -> Page:
    (folder / "numbers.json").write_text(json.dumps(numbers))
    (folder / "evidence.json").write_text(json.dumps(evidence))
    return Page(write_report(folder).read_text(encoding="utf-8"))


def texts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every text in `value`, as its container and key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        if isinstance(value[key], str):
            yield value, key
        elif isinstance(value[key], dict | list):
            yield from texts(value[key])


def of_batch_sizes(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in `value` whose keys are batch sizes."""
    if isinstance(value, dict) and "1" in value:
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from of_batch_sizes(each)


@pytest.fixture
def ordinary(folder) -> Page:
    return page_of(folder, numbers_of(), evidence_of())


def test_hostile_text_is_escaped(folder, ordinary):
    """Texts are replaced one by one, because some prevent the page from being written; then all others at once."""
    whole = {"numbers": numbers_of(), "evidence": evidence_of()}
    escaped: list[int] = []
    for number in range(len(list(texts(whole)))):
        changed = copy.deepcopy(whole)
        holder, key = list(texts(changed))[number]
        holder[key] = "".join(HOSTILE)
        try:
            page = page_of(folder, **changed)
        except InputError:
            continue
        escaped.append(number)
        assert page.elements <= ordinary.elements, (key, page.elements - ordinary.elements)
        assert all(each.startswith("data:") for each in page.loaded), key
    assert len(escaped) > 20
    for hostile in HOSTILE:
        changed = copy.deepcopy(whole)
        places = list(texts(changed))
        for number in escaped:
            holder, key = places[number]
            holder[key] = hostile
        page = page_of(folder, **changed)
        assert page.elements <= ordinary.elements, (hostile, page.elements - ordinary.elements)
        assert all(each.startswith("data:") for each in page.loaded), hostile


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_keys_are_escaped(folder, ordinary, hostile):
    numbers, evidence = numbers_of(), evidence_of()
    numbers["stages"][0]["methods"] = [{hostile: {hostile: hostile}}, hostile]
    evidence["attention"]["layers"] = {hostile: [hostile]}
    evidence["attention"]["images"][0]["maps"] = {hostile: [evidence["attention"]["images"][0]["png"]]}
    page = page_of(folder, numbers, evidence)
    assert page.elements <= ordinary.elements
    assert all(each.startswith("data:") for each in page.loaded)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_batch_sizes_that_are_not_numbers_raise(folder, hostile):
    whole = {"numbers": numbers_of(), "evidence": evidence_of()}
    for place in range(len(list(of_batch_sizes(whole)))):
        changed = copy.deepcopy(whole)
        by_batch_size = list(of_batch_sizes(changed))[place]
        by_batch_size[hostile] = by_batch_size["1"]
        with pytest.raises(InputError, match="was not written by this version of tersor"):
            page_of(folder, **changed)


@pytest.mark.parametrize("source", ["https://elsewhere/x.png", "javascript:alert(1)", "data:text/html,<p>", "//x", ""])
def test_pictures_that_are_not_inline_raise(folder, source):
    evidence = evidence_of()
    evidence["predictions"]["examples"][0]["png"] = source
    with pytest.raises(InputError, match="was not written by this version of tersor"):
        page_of(folder, numbers_of(), evidence)


@pytest.mark.parametrize("bits", [10**12, 2**60, -1, 33])
def test_impossible_bit_widths_raise(folder, bits):
    evidence = evidence_of()
    evidence["layers"][0]["weight_bits"] = bits
    with pytest.raises(InputError, match=r"a weight of|an integer of 19 digits"):
        page_of(folder, numbers_of(), evidence)


@pytest.mark.parametrize("name", ["numbers.json", "evidence.json"])
@pytest.mark.parametrize("text", ["[]", "null", '"text"', "1", "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"])
def test_a_wrong_json_type_raises_one_error(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=rf"^{folder / name} is damaged: .* Run its recipe\.yaml again\.$") as caught:
        write_report(folder)
    assert "InputError" not in str(caught.value), "not blamed on the version"
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("key", ["profile", "soft_targets", "attention", "predictions", "layers"])
@pytest.mark.parametrize("empty", [{}, [], None, 0, "", [None], {"1": None}])
def test_incomplete_evidence_gives_a_page_or_one_error(folder, key, empty):
    try:
        page_of(folder, numbers_of(), evidence_of() | {key: empty})
    except InputError as error:
        assert "Run its recipe.yaml again" in str(error)  # noqa: PT017
