"""The heat map of `tersor sensitivity`."""

import re
from xml.etree import ElementTree as ET

import pytest

from tersor.quantization.sensitivity import Cost
from tersor.report.sensitivity_map import sensitivity_svg

SVG = "{http://www.w3.org/2000/svg}"
WEIGHTS = {"stem": 432, "stage.0.conv<1>": 9216, "head": 640}
ERRORS = {2: 0.5, 4: 0.02, 8: 1e-5}
COSTS = [Cost(name, bits, error * size / 640, 0.25) for name, size in WEIGHTS.items() for bits, error in ERRORS.items()]


def svg_of(costs=COSTS, weights=None):
    return ET.fromstring(sensitivity_svg(costs, weights or WEIGHTS, "resnet20 & co", "2,000 images"))


def texts(svg):
    return [each.text for each in svg.iter(f"{SVG}text")]


def luminance(colour):
    red, green, blue = (int(part, 16) / 255 for part in re.findall("..", colour.lstrip("#")))
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_map_has_a_row_per_layer_and_a_column_per_width():
    labels = texts(svg_of())
    assert labels[:2] == ["resnet20 & co", "2,000 images"]
    assert [text for text in labels if text.endswith(" bits")] == ["2 bits", "4 bits", "8 bits"]
    assert {"stem (432)", "stage.0.conv<1> (9,216)", "head (640)"} <= set(labels)
    cells = [[each.text for each in group] for group in svg_of().iter(f"{SVG}g")]
    assert len(cells) == 9
    assert cells[6] == ["head at 2 bits: error 50 %, metric worse by 0.25", None, "50"]


def test_larger_errors_are_darker_and_texts_have_enough_contrast():
    groups = {group[0].text.split(":")[0]: group for group in svg_of().iter(f"{SVG}g")}
    for name in WEIGHTS:
        shades = [luminance(groups[f"{name} at {bits} bits"][1].get("fill")) for bits in (2, 4, 8)]
        assert shades == sorted(shades)
    every = [Cost("a", 2, 10 ** (-place / 100), None) for place in range(500)]  # the whole scale
    for group in (*groups.values(), *svg_of(every, {"a": 1}).iter(f"{SVG}g")):
        pair = sorted(luminance(group[place].get("fill")) for place in (1, 2))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, group[0].text


def test_all_elements_are_inside_the_view_box_and_nothing_is_loaded():
    svg = svg_of()
    _, _, wide, high = map(float, svg.get("viewBox").split())
    for rect in svg.iter(f"{SVG}rect"):
        if rect.get("width") != "100%":
            assert float(rect.get("x")) + float(rect.get("width")) <= wide
            assert float(rect.get("y")) + float(rect.get("height")) <= high
    for text in svg.iter(f"{SVG}text"):
        assert float(text.get("x")) <= wide
        assert float(text.get("y")) <= high
    assert not re.search(r"href|url\(|<script|<style", sensitivity_svg(COSTS, WEIGHTS, "a", "b"))


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_a_map_with_a_single_error_can_be_drawn(error):
    assert "error 0 %" in sensitivity_svg([Cost("a", 2, 0.0, None)], {"a": 1}, "t", "s")
    assert len(list(svg_of([Cost("a", 2, error, None)], {"a": 1}).iter(f"{SVG}g"))) == 1
