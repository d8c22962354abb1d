"""PSGD: the scale of the authors' code, a step computed by hand, and the final positions of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.graph.parametrization import parametrizations_of
from tersor.methods.psgd import PSGD, distance
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.range_tracking import RunningLargest
from tersor.training.context import AttachContext

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "psgd.json").read_text())


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 4))


def gradients(model, seed=1):
    """Compute the gradients of one batch and keep them in the parameters."""
    draw = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(16, 3, 8, 8, generator=draw), torch.randint(0, 4, (16,), generator=draw)
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def weights(model):
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['bits']} bits")
def test_distance_and_running_range_equal_the_authors_code(case):
    weight, tracker = torch.tensor(case["weight"]), RunningLargest()
    for step, largest in enumerate(case["largest"]):
        tracker.follow(weight * (1 + step), first=step == 0)
        assert float(tracker.largest) == pytest.approx(largest, rel=1e-6)
    found = distance(weight, tracker.largest, Grid.signed(case["bits"]))
    assert torch.allclose(found, torch.tensor(case["distance"]), atol=1e-7)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_step_by_hand(bits, per_channel):
    """Weight decay is not scaled, momentum is of scaled gradients; below 4 bits, the outer layers have 8 bits."""
    rate, momentum, decay, mean_scale = 0.1, 0.9, 0.01, 3.0
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    method = PSGD(bits=bits, per_channel=per_channel, mean_scale=mean_scale)
    method.attach(model, AttachContext(steps=2)).bind(optimizer)
    speeds = [torch.zeros_like(weight) for weight in weights(model)]
    for step in range(2):
        gradients(model, step)
        expected, far = [], []
        for place, weight in enumerate(weights(model)):
            levels = 2 ** ((8 if bits < 4 and place in (0, 2) else bits) - 1) - 1
            rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
            points = [
                torch.linspace(-float(row.abs().max()), float(row.abs().max()), 2 * levels + 1, dtype=torch.float64)
                for row in rows
            ]
            each = [(row[:, None] - at).abs().amin(1) for row, at in zip(rows.double(), points, strict=True)]
            far.append(torch.stack(each).reshape(weight.shape))
        if not step:  # and from then on
            scale = mean_scale / torch.cat([each.flatten() for each in far]).mean()
        for weight, each, speed in zip(weights(model), far, speeds, strict=True):
            speed.mul_(momentum).add_(weight.grad * (scale * each) + decay * weight.detach())
            expected.append(weight.detach() - rate * speed)
        optimizer.step()
        for weight, wanted in zip(weights(model), expected, strict=True):
            assert torch.allclose(weight, wanted.to(weight.dtype), atol=1e-6)


@pytest.mark.parametrize("strength", [None, 40.0])
@pytest.mark.parametrize("target", ["grid", "zero"])
def test_the_control_has_the_same_mean_scale_and_no_variation(strength, target):
    factors = {}
    for scale_by in ("distance", "constant"):
        model = network()
        gradients(model)
        before = [weight.grad.clone() for weight in weights(model)]
        attached = PSGD(strength=strength, scale_by=scale_by, target=target, mean_scale=2.5).attach(
            model, AttachContext(steps=1)
        )
        attached.before_step(0, torch.optim.SGD(model.parameters(), lr=0.1))
        scaled = [weight.grad / old for weight, old in zip(weights(model), before, strict=True)]
        factors[scale_by] = torch.cat([each.flatten() for each in scaled])
    factors = {name: each[each.isfinite()] for name, each in factors.items()}
    assert float(factors["distance"].mean()) == pytest.approx(float(factors["constant"].mean()), rel=0.02)
    assert factors["constant"].std() < 1e-3 * factors["constant"].mean()
    assert factors["distance"].std() > 0.3 * factors["distance"].mean()
    if strength is None:
        assert float(factors["constant"].mean()) == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize("target", ["grid", "zero"])
def test_weights_move_towards_the_target_more_than_with_the_control(target):
    """The mean scale of both is the same."""
    ends = {}
    for scale_by in ("distance", "constant"):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        attached = PSGD(bits=3, target=target, scale_by=scale_by).attach(model, AttachContext(steps=150))
        handle = attached.bind(optimizer)
        for step in range(150):
            gradients(model, step % 4)
            optimizer.step()
        handle.remove()
        sizes = torch.cat([weight.detach().abs().flatten() for weight in weights(model)]).sort().values
        smaller_half = float(sizes[: len(sizes) // 2].sum() / sizes.sum())
        ends[scale_by] = attached.metrics["mean_distance"] / float(sizes.mean()) if target == "grid" else smaller_half
    assert ends["distance"] < 0.97 * ends["constant"], ends


@pytest.mark.parametrize(
    "options", [{}, {"range": "running"}, {"target": "zero"}, {"per_channel": False}, {"scale_by": "constant"}]
)
def test_metrics_summarize_positions_and_movement(options):
    """Movement grows with the initial distance, which is stored; not for the control."""
    model = network()
    attached = PSGD(mean_scale=4.0, **options).attach(model, AttachContext(steps=20))
    handle = attached.bind(optimizer := torch.optim.SGD(model.parameters(), lr=0.01))
    for step in range(20):
        gradients(model, step % 4)
        optimizer.step()
    handle.remove()
    metrics = attached.metrics["drawn"]
    assert metrics["target"] == options.get("target", "grid")
    assert [(each["name"], sum(each["before"])) for each in metrics["layers"]] == [("0", 162), ("2", 270), ("4", 320)]
    of_all = metrics["all"]
    untrained = PSGD(**{**options, "range": "exact"}).attach(network(), AttachContext(steps=1)).metrics["drawn"]["all"]
    assert untrained["moved"] == [0.0] * 10
    assert untrained["before"] == untrained["after"] == of_all["before"]
    before, after = of_all["distance"]
    drawn = metrics["scale_by"] == "distance"
    assert (after < 0.9 * before) is drawn
    assert (of_all["moved"][-1] > 3 * of_all["moved"][0]) is drawn


def test_there_is_no_summary_after_channels_are_removed():
    model = network()
    attached = PSGD().attach(model, AttachContext(steps=1))
    for layer in (model[0], model[2], model[4]):
        layer.weight.data = layer.weight.data[:2]
    assert attached.metrics.keys() == {"mean_distance"}


def test_a_weight_on_a_grid_point_does_not_move_and_a_bias_does():
    model = network()
    with torch.no_grad():
        model[2].weight.copy_(torch.randint(-7, 8, model[2].weight.shape) / 7)
        model[2].weight[:, 0, 0, 0] = 1.0
    before = model[2].weight.detach().clone()
    bias = model[2].bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PSGD(bits=4, mean_scale=1.0).attach(model, AttachContext(steps=1)).bind(optimizer)
    gradients(model)
    optimizer.step()
    assert torch.allclose(model[2].weight, before, atol=1e-6)
    assert not torch.allclose(model[2].bias, bias)


def test_tracking_the_range_does_not_change_the_weights():
    model = network()
    images = torch.randn(2, 3, 8, 8)
    before = model(images)
    PSGD(range="running").attach(model, AttachContext(steps=1))
    assert torch.equal(model(images), before)
    PSGD(range="running").attach(model, AttachContext(steps=1))
    assert sum(isinstance(each, RunningLargest) for each in parametrizations_of(model[0])) == 1
    with pytest.raises(InputError, match="different per_channel"):
        PSGD(range="running", per_channel=False).attach(model, AttachContext(steps=1))


def test_invalid_layers_and_quantized_weights_raise():
    model = network()
    with pytest.raises(InputError, match="matches no layer"):
        PSGD(layers=("conv9",)).attach(model, AttachContext(steps=1))
    with pytest.raises(InputError, match="no convolution and no fully connected layer"):
        PSGD().attach(nn.Sequential(nn.ReLU()), AttachContext(steps=1))
    parametrize.register_parametrization(model[0], "weight", FakeQuantize(Grid.signed(4), channels=6))
    with pytest.raises(InputError, match="already quantized"):
        PSGD().attach(model, AttachContext(steps=1))
