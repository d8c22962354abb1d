from __future__ import annotations

import json

import pytest
import torch

from tersor.quantization.grid import Grid
from tersor.quantization.grid_distance import around_zero, drawn, on_grid


def laid(*weights, largest=3.0):
    """Weights on the grid from -3 to 3 in steps of 1."""
    return on_grid(torch.tensor([weights]), torch.tensor(largest), Grid.signed(3))


def test_positions_are_measured_in_steps_of_each_channel():
    weight = torch.tensor([[0.25, -3.0, 1.75], [0.5, 6.0, 8.0]])
    found = on_grid(weight, torch.tensor([3.0, 6.0]), Grid.signed(3)).positions
    assert torch.allclose(found, torch.tensor([0.25, 0.0, -0.25, 0.25, 0.0, 1.0])), "8 is outside of the grid"


def test_with_target_zero_there_is_one_point():
    assert around_zero(torch.tensor([[0.0, 1.0, -4.0]])).positions.tolist() == [0.0, 0.125, -0.5]
    assert around_zero(torch.zeros(1, 2)).positions.tolist() == [0.0, 0.0]


def test_distances_and_movements_match_values_computed_by_hand():
    """Two weights start 0.12 and 0.32 from a point and move 0.1 and 0.3 towards it; one stays on its point."""
    found = drawn({"a": laid(0.12, 1.32, -3.0)}, {"a": laid(0.02, 1.02, -3.0)})["all"]
    assert found["distance"] == pytest.approx([0.44 / 3, 0.04 / 3], abs=1e-6)
    assert found["moved"] == [0.0, None, pytest.approx(0.1), *[None] * 3, pytest.approx(0.3), *[None] * 3]
    assert [place for place, count in enumerate(found["before"]) if count] == [16, 20, 27]
    assert [place for place, count in enumerate(found["after"]) if count] == [16, 17]
    assert sum(found["before"]) == sum(found["after"]) == 3


def test_movements_are_measured_in_steps_of_the_initial_grid():
    found = drawn({"a": laid(0.25, 3.0)}, {"a": laid(0.25, 6.0, largest=6.0)})["all"]
    assert found["moved"][0] == pytest.approx(3.0)
    assert found["distance"] == pytest.approx([0.125, 0.0625])


def test_the_outermost_bins_contain_weights_at_half_a_step_and_beyond_the_grid():
    found = drawn({"a": laid(1.5, 2.5, 7.0)}, {"a": laid(1.5, 2.0, 8.0)})["all"]
    assert {place: count for place, count in enumerate(found["before"]) if count} == {0: 1, 32: 2}
    assert found["moved"] == [*[None] * 9, pytest.approx(0.5)]


def test_a_few_layers_and_all_weights_are_summarized():
    torch.manual_seed(0)
    before = {f"layer{place}": laid(*torch.randn(10 + place).tolist()) for place in range(300)}
    found = drawn(before, before)
    assert [each["name"] for each in found["layers"]] == [f"layer{place}" for place in (0, 60, 120, 179, 239, 299)]
    assert sum(found["all"]["before"]) == sum(10 + place for place in range(300))
    assert {each["bits"] for each in found["layers"]} == {3}
    assert len(json.dumps(found)) < 10_000
