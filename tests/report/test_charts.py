from __future__ import annotations

import re

from samples import evidence_of

from tersor.report.charts import bar, columns, dots, histogram


def test_every_run_is_a_dot_and_those_beyond_are_told():
    drawn = dots([1.0, 2.0, 9.0], 4.0, "original", "three runs")
    assert re.findall(r'cx="([^"]+)"', drawn) == ["25.00%", "50.00%"]
    assert drawn.count('class="beyond"') == 1
    assert "run 3: 9.000 ms" in drawn
    assert 'x1="50.00%"' in drawn, "the median"


def test_a_bar_has_its_share_of_the_width():
    assert 'width="25.00%"' in bar(1.0, 4.0, "artifact", "a")
    assert 'width="0.00%"' in bar(0.0, 0.0, "artifact", "nothing at all")


def test_columns_are_as_high_as_their_values():
    drawn = columns([("a", {"original": 4.0, "artifact": 1.0}), ("b", {"original": 2.0, "artifact": 0.0})], "l")
    heights = re.findall(r'height="([\d.]+%)" class="(?:original|artifact)"', drawn)
    assert heights == ["100.00%", "25.00%", "50.00%", "0.00%"]
    assert "<title>a: original 4.00, artifact 1.00</title>" in drawn


def test_a_histogram_has_a_bar_for_each_level_and_cuts_that_of_the_zeros():
    told = evidence_of()["layers"][0]["histogram"]
    drawn = histogram(told, "l")
    bars = re.search(r'd="(M[^"]+)" class="artifact"', drawn)[1]
    heights = [float(height) for height in re.findall(r"v-([\d.]+)h", bars)]
    assert len(heights) == 3
    highest = max(told["before"]) / told["width"]
    assert heights[0] == round(64 * 3 / highest, 1)
    assert heights[1] == round(64 * 17 / highest, 1)
    told["shown"][1] = 1000
    assert "v-64h" in histogram(told, "l")
    uncut = re.search(r'd="(M[^"]+)" class="artifact"', histogram(told, "l", cut=False))[1]
    assert re.findall(r"v-([\d.]+)h", uncut) == ["0.2", "64", "0.3"]


def test_a_layer_of_zeros_alone_is_drawn():
    told = {"low": -0.5, "width": 1.0, "shown_width": 1.0, "before": [4], "shown": [4]}
    assert "v-64h256" in histogram(told, "l")
