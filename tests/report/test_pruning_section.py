"""The sections of the report about pruning and training progress."""

from __future__ import annotations

import re

import pytest
from samples import entry, evidence_of, numbers_of


def test_a_line_chart_spans_the_full_width(chart):
    path, dots = re.findall(
        r'd="([^"]+)"', chart("line", [(0, 1.0), (5, 3.0), (10, 2.0)], 20, 1.0, 3.0, "accuracy", "l")
    )
    assert path == "M0 62L64 2L128 32"
    assert dots == "M0 62h0M64 2h0M128 32h0"
    many = chart("line", [(x, 0.5) for x in range(100)], 100, 0.0, 1.0, "changed", "l")
    assert 'class="dot"' not in many
    assert "62" in chart("line", [(1, 0.0)], 1, 0.0, 0.0, "changed", "nothing ever changed")


def test_the_height_of_a_column_is_relative_to_a_given_maximum(chart):
    assert 'height="25.00%" class="zeros"' in chart("columns", [("a", {"zeros": 25.0})], "l", largest=100)


def test_the_silhouette_has_the_widths_of_the_layers(chart):
    widths = [{"name": "a", "before": 16, "after": 16}, {"name": "b", "before": 64, "after": 32}]
    layers = chart("silhouette", widths, "l")
    assert re.findall(r'height="([\d.]+)" class="(\w+)"', layers) == [
        ("16.00", "original"), ("16.00", "artifact"), ("64.00", "original"), ("32.00", "artifact")]  # fmt: skip
    assert re.findall(r' y="([\d.]+)"', layers) == ["24.00", "24.00", "0.00", "16.00"], "in the middle"
    assert "<title>a: 16 channels</title>" in layers
    assert "<title>b: 64 channels, 32 remain</title>" in layers


def test_the_mask_grid_has_a_filled_square_for_each_kept_weight(chart):
    shown = chart("mask_grid", [["100001", "000000"], ["111111", "010000"]], [2, 2, 2, 3], "l")
    kernels, kept = re.findall(r'd="([^"]*)"', shown)
    assert kernels.count("M") == 4
    squares = re.findall(r"M([\d.]+) ([\d.]+)h1v1h-1z", kept)
    assert squares[:2] == [("0", "0"), ("2", "1")], "the first and the last of the first kernel"
    assert squares[-1] == ("4.7", "2.7"), "the second of the last kernel"
    assert len(squares) == 2 + 6 + 1
    assert 'viewBox="0 0 6.7 4.7"' in shown


def test_sparsity_masks_and_widths_are_shown_if_there_are_any(page):
    text = page()
    assert "<h2>Pruning</h2>" in text
    assert "<title>conv: masked 25.0, zeros 50.0</title>" in text
    assert "filters 1 to 2 of 2, channels 1 to 3 of 3; 25.0 % of the layer is masked" in text
    assert "4 of 6 channels remain; 1 of 2 layers are narrower" in text
    whole = evidence_of(masks=[], widths=[{"name": "conv", "before": 4, "after": 4}])
    for layer in whole["layers"]:
        layer |= {"zeros": 0, "sparsity": 0.0, "masked": 0.0}
    assert "<h2>Pruning</h2>" not in page(evidence=whole)


def test_zeros_from_rounding_are_not_called_masked(page):
    evidence = evidence_of(masks=[])
    for layer in evidence["layers"]:
        layer["masked"] = 0.0
    text = page(evidence=evidence)
    assert "<title>conv: 50.0</title>" in text
    assert "zero</span>; no weight is masked" in text
    assert ">masked<" not in text


def test_masks_and_accuracy_during_training_are_shown(page):
    text = page()
    section = re.search(r"<h2>Training progress</h2>.*?</section>", text)[0]
    assert section.count("<figure>") == 1, "one stage has curves"
    assert "from 0 to 50.0 %" in section
    assert "from 60.00 to 80.00 %" in section
    sparsity, changed, accuracy = (
        re.search(rf'class="line {kind}".*?<path d="([^"]+)"', section)[1] for kind in ("sparsity", "changed", "score")
    )
    assert sparsity == "M64 32L128 20L192 14"
    assert changed == "M64 2L128 32L192 47"
    assert accuracy == "M128 62L256 2"
    assert "standard deviation" not in section, "two values are too few"


def test_the_standard_deviation_of_the_last_validations_is_shown(page):
    numbers = numbers_of()
    values = [10.0, 90.0, 92.0, 90.0, 92.0, 91.0]
    del numbers["stages"][2]["masks"]
    numbers["stages"][2] |= {"validated_at": [*range(1, 7)], "validation_by_epoch": values}
    text = page(numbers)
    assert "last 5 of 6 validations: mean 91.00 %, standard deviation 1.00" in text
    assert "Changed:" not in text
    del numbers["stages"][2]["validation_by_epoch"], numbers["stages"][2]["validated_at"]
    assert "Training progress" not in page(numbers)


@pytest.mark.parametrize("masked", [0.0, 0.9])
def test_the_page_says_that_masks_are_not_faster_if_there_are_any(page, masked):
    artifact = entry(1.0, size=1_000_000) | {"masked": masked, "sparsity": 0.9, "compressed_bytes": 200_000}
    text = page(numbers_of(artifact=artifact))
    sentence = "A runtime without sparse kernels is not faster with masks"
    assert (sentence in text) == (masked > 0)
    assert ("90.0 % of the prunable weights are masked, not removed" in text) == (masked > 0)
    row = re.search(r'<th scope="row">file size after gzip, MB</th>(.*?)</tr>', text)[1]
    assert re.findall(r"<td>([\d.]+)</td>", row) == ["2.00", "2.00", "0.200"]
    assert "10.00x lower" in row
