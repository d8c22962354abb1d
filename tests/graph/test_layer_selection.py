from __future__ import annotations

import pytest
from torch import nn

from tersor.core.errors import InputError
from tersor.graph.layer_selection import matching, weighted_layers, without

NAMES = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer10.0.conv1", "linear"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], []),
        (["linear"], ["linear"]),
        (["layer1"], ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]),
        (["layer1.0"], ["layer1.0.conv1", "layer1.0.conv2"]),
        (["layer1.*.conv1"], ["layer1.0.conv1", "layer1.1.conv1"]),
        (["*conv1"], ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer10.0.conv1"]),
        (["conv?", "linear"], ["conv1", "linear"]),
        (["layer[12].*"], ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]),
        (["*"], NAMES),
    ],
)
def test_patterns_match_names_and_their_children(patterns, expected):
    assert matching(patterns, NAMES) == set(expected)


def test_a_pattern_without_a_match_raises_and_suggests_the_nearest_name():
    with pytest.raises(InputError, match=r"'layer1\.0\.conv3' matches no layer\. Did you mean 'layer1\.0\.conv"):
        matching(["linear", "layer1.0.conv3"], NAMES)
    with pytest.raises(InputError, match="Linear"):  # matching is case-sensitive
        matching(["Linear"], NAMES)


def test_a_long_list_of_layers_is_truncated():
    with pytest.raises(InputError, match=r"\.\.\. \(40 in all\)") as refusal:
        matching(["zzz"], [f"features.{number}" for number in range(40)])
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(("count", "shown"), [(12, r"f\.10, f\.11\.$"), (13, r"f\.11, \.\.\. \(13 in all\)\.$")])
def test_up_to_twelve_layers_are_listed(count, shown):
    with pytest.raises(InputError, match=shown):
        matching(["zzz"], [f"f.{number}" for number in range(count)])


def test_weighted_layers_are_convolutions_and_linears_in_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    assert list(weighted_layers(model)) == ["0", "2.1"]


def test_without_removes_matching_layers():
    layers = weighted_layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))))
    assert list(without(layers, [])) == ["0", "1.0", "1.1"]
    assert list(without(layers, ["1"])) == ["0"]
    assert not without(layers, ["*"])
