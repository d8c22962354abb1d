from __future__ import annotations

import re

from samples import evidence_of


def test_every_run_is_a_dot_and_runs_beyond_the_axis_are_squares(chart):
    svg = chart("dots", [1.0, 2.0, 9.0], 4.0, "original", "three runs")
    assert re.findall(r'cx="([^"]+)"', svg) == ["25.00%", "50.00%"]
    assert svg.count('class="beyond"') == 1
    assert "round 3: 9.000 ms" in svg
    assert 'x1="50.00%"' in svg, "the median"


def test_the_width_of_a_bar_is_proportional_to_its_value(chart):
    assert 'width="25.00%"' in chart("bar", 1.0, 4.0, "artifact", "a")
    assert 'width="0.00%"' in chart("bar", 0.0, 0.0, "artifact", "nothing at all")


def test_the_height_of_columns_is_proportional_to_their_values(chart):
    svg = chart("columns", [("a", {"original": 4.0, "artifact": 1.0}), ("b", {"original": 2.0, "artifact": 0.0})], "l")
    heights = re.findall(r'height="([\d.]+%)" class="(?:original|artifact)"', svg)
    assert heights == ["100.00%", "25.00%", "50.00%", "0.00%"]
    assert "<title>a: original 4.00, artifact 1.00</title>" in svg
    assert "<title>a: 4.00</title>" in chart("columns", [("a", 4.0)], "l")


def test_a_histogram_has_a_bar_per_level_and_truncates_the_bar_at_zero(chart):
    histogram = evidence_of()["layers"][0]["histogram"]
    svg = chart("histogram", histogram, "l")
    bars = re.search(r'd="(M[^"]+)" class="artifact"', svg)[1]
    heights = [float(height) for height in re.findall(r"v-([\d.]+)h", bars)]
    assert len(heights) == 3
    highest = max(histogram["before"]) / histogram["width"]
    assert heights[0] == round(64 * 3 / highest, 1)
    assert heights[1] == round(64 * 17 / highest, 1)
    histogram["after"][1] = 1000
    assert "v-64h" in chart("histogram", histogram, "l")
    uncut = re.search(r'd="(M[^"]+)" class="artifact"', chart("histogram", histogram, "l", cut_zero=False))[1]
    assert re.findall(r"v-([\d.]+)h", uncut) == ["0.2", "64", "0.3"]


def test_the_histogram_of_a_layer_with_only_zeros(chart):
    histogram = {"low": -0.5, "width": 1.0, "after_width": 1.0, "before": [4], "after": [4]}
    assert "v-64h256" in chart("histogram", histogram, "l")
