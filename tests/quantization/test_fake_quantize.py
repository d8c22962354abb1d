from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.quantization.fake_quantize import FakeQuantize, quantizers_disabled
from tersor.quantization.grid import Grid
from tersor.quantization.range_tracking import RunningLargest


def tracking() -> FakeQuantize:
    """A quantizer of activations with moving averages that were updated once."""
    quantizer = FakeQuantize(Grid(0, 255)).track_activations(0.1)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    return quantizer.train()


@pytest.mark.parametrize("active", [True, False])
def test_the_state_dict_restores_whether_the_range_is_still_updated(active):
    saved, loaded = tracking(), tracking()
    saved.observer.active = active
    loaded.observer.active = not active
    loaded.load_state_dict(saved.state_dict())
    assert loaded.is_trained is active
    loaded(torch.tensor([-8.0, 8.0]))
    assert (float(loaded.observer.high) > 1) is active


def test_the_range_of_activations_is_a_moving_average_updated_in_training_only():
    quantizer, values = tracking(), torch.tensor([-3.0, 0.5, 2.0])
    quantizer(values)
    assert (float(quantizer.observer.low), float(quantizer.observer.high)) == pytest.approx((-1.2, 1.1))
    assert float(quantizer.scale) == pytest.approx(2.3 / 255)
    assert int(quantizer.zero_point) == round(1.2 * 255 / 2.3)
    for run in (lambda: quantizer(values, moved=True), lambda: quantizer.eval()(values)):
        run()
        assert float(quantizer.observer.low) == pytest.approx(-1.2)


def test_values_are_not_rounded_before_the_grid_is_set_or_with_quantizers_disabled():
    first, second, values = FakeQuantize(Grid.signed(2)), FakeQuantize(Grid.signed(2)), torch.tensor([0.2, 0.8, -5.0])
    assert first(values) is values
    first.set_grid(torch.tensor(0.5))
    assert first(values).tolist() == [0.0, 0.5, -0.5]
    with quantizers_disabled(nn.Sequential(first, second)):
        assert first(values) is values
    assert (first.enabled, second.enabled) == (True, False)
    loaded = FakeQuantize(Grid.signed(8))
    loaded.load_state_dict(first.state_dict())
    assert (loaded.enabled, loaded.grid) == (True, Grid.signed(2))


def test_the_grid_of_a_weight_keeps_its_fraction_of_the_range_during_training():
    weight = torch.tensor([[4.0, -8.0], [0.0, 0.0], [3.0, 7.0]])
    quantizer = FakeQuantize(Grid.signed(4), channels=3).track_weight()
    quantizer.set_grid(torch.tensor([4 / 7, 2.0, 1.0]))
    quantizer.measure_share(weight)
    assert quantizer.observer.share.tolist() == pytest.approx([0.5, 1.0, 1.0])
    assert not quantizer.is_trained
    quantizer.follow_weight(torch.tensor([[1.0, 14.0], [7.0, 0.0], [-21.0, 7.0]]))
    assert quantizer.scale.tolist() == pytest.approx([1.0, 1.0, 3.0])


def test_step_and_offset_are_learned_and_then_fixed():
    quantizer = FakeQuantize(Grid.unsigned(4), channels=2)
    quantizer.set_grid(torch.tensor([0.5, 2.0]), torch.tensor([3, 10]))
    quantizer.learn_step(offset=True)
    assert quantizer.is_trained
    assert quantizer.learned_step.offset.tolist() == [-1.5, -20.0]
    assert {name for name, _ in quantizer.named_parameters()} == {"scale", "learned_step.offset"}
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor([-1.0, 0.5]))
        quantizer.learned_step.offset[1] = -4.0
    quantizer.follow_step()
    assert 0 < quantizer.scale[0].item() < 1e-6
    assert quantizer.zero_point.tolist() == [15, 8], "the first is clipped to the grid"
    quantizer.fix_step()
    assert not quantizer.is_trained
    assert not list(quantizer.parameters())
    assert quantizer.scale[1].item() == 0.5


def test_running_largest_is_a_moving_average_of_the_largest_value():
    weights = [torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[4.0, 0.0], [-13.0, 1.0]])]
    for channels, expected in ((2, ([2.0, 3.0], [2.2, 4.0])), (None, (3.0, 4.0))):
        running = RunningLargest(channels)
        for number, (weight, mean) in enumerate(zip(weights, expected, strict=True)):
            running.follow(weight, first=number == 0)
            assert running.largest.tolist() == pytest.approx(mean)
            assert running(weight) is weight


def test_loading_a_zero_point_outside_the_grid_raises():
    quantizer = FakeQuantize(Grid.unsigned(4))
    quantizer.set_grid(torch.tensor(0.1), torch.tensor(15))
    state = quantizer.state_dict()
    FakeQuantize(Grid.unsigned(4)).load_state_dict(state)
    state["zero_point"] = torch.tensor(16, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="a zero point outside its grid from 0 to 15"):
        FakeQuantize(Grid.unsigned(4)).load_state_dict(state)


class Halves(FakeQuantize):
    """A user's own quantizer."""


@pytest.mark.parametrize(
    ("channels", "name", "given", "message"),
    [
        (3, "scale", (3, 1, 1, 1), "Halves: scale has the shape (3, 1, 1, 1). Pass one of the shape (3,), "),
        (
            3,
            "scale",
            (2,),
            "Halves: scale has the shape (2,). Pass one of the shape (3,), one value per output channel",
        ),
        (3, "zero_point", (2,), "Halves: zero_point has the shape (2,). Pass one of the shape (3,), one value per "),
        (None, "scale", (3,), "Halves: scale has the shape (3,). Pass one of the shape (), one value for the whole "),
    ],
)
def test_a_scale_or_zero_point_with_a_wrong_shape_raises(channels, name, given, message):
    grids = {"scale": torch.tensor(0.5), "zero_point": torch.tensor(0)}
    quantizer = Halves(Grid.signed(4), channels)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        quantizer.set_grid(**{**grids, name: torch.ones(given)})
    assert not quantizer.enabled
    quantizer.set_grid(**grids)
    assert quantizer(torch.full((3, 2, 1, 1), 0.8)).flatten().tolist() == [1.0] * 6
    setattr(quantizer, name, torch.ones(given).to(getattr(quantizer, name)))
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        quantizer(torch.ones(3, 2, 1, 1))
