from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from recorded_progress import RecordedProgress
from tersor.core.target import Target
from tersor.graph.capture import capture
from tersor.graph.parametrization import parametrized
from tersor.pruning.mask import Mask
from tersor.quantization.calibration import set_ranges
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.quantizer_options import Precision, Ranges
from tersor.quantization.quantizers import insert_quantizers
from tersor.quantization.reconstruction import Reconstruction, _error, _rounding_penalty, _SoftRounding, reconstruct

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "brecq.json").read_text())
VNNI = Target(cpu="vnni")
LAYERS = Reconstruction(by_block=False, learn_steps=False, drop=0.0, iterations=60, seed=0)
BLOCKS = Reconstruction(by_block=True, learn_steps=True, drop=0.0, iterations=60, seed=0)
DROPPING = Reconstruction(by_block=True, learn_steps=True, drop=0.5, iterations=60, seed=0)
ALL = pytest.mark.parametrize("how", [LAYERS, BLOCKS, DROPPING], ids=["layers", "blocks", "dropping"])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def images(count=64, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def calibrated(model=None, bits=2, activation_bits=4):
    """A network with calibrated quantizers, and the float network."""
    graph = capture(model or Small().eval(), images())
    quantizers = insert_quantizers(
        graph, Precision(bits, activation_bits, bits), exclude=(), target=VNNI, method="adaround"
    )
    original = copy.deepcopy(graph)
    set_ranges(quantizers, [images()], Ranges("mse", "mse", 99.99, 64), target=VNNI, method="adaround")
    return quantizers, original


def test_soft_rounding_initially_keeps_the_weights():
    layer = nn.Conv2d(3, 4, 3)
    quantizer = FakeQuantize(Grid.signed(4), 4)
    parametrize.register_parametrization(layer, "weight", quantizer)
    quantizer.set_grid(parametrized(layer).original.detach().abs().flatten(1).amax(1) / 7)
    soft = _SoftRounding(layer, quantizer)
    original = parametrized(layer).original.detach()
    assert torch.allclose(soft.weight(soft.h()), original, atol=2e-3 * float(quantizer.scale.max()))
    assert torch.allclose(soft.weight((soft.h() >= 0.5).float()), layer.weight, atol=1e-6)


def test_the_rounding_penalty_equals_the_formula_of_the_paper():
    layer = nn.Linear(5, 3)
    quantizer = FakeQuantize(Grid.signed(3), 3)
    parametrize.register_parametrization(layer, "weight", quantizer)
    quantizer.set_grid(torch.tensor([0.1, 0.2, 0.3]))
    soft = _SoftRounding(layer, quantizer)
    soft.logits.data = torch.linspace(-4, 4, 15).reshape(3, 5)
    assert _rounding_penalty([soft], 0.1) == 0
    for progress in (0.2, 0.5, 0.9):
        beta = 20 - 18 * (progress - 0.2) / 0.8
        expected = 0.0
        for logit in soft.logits.flatten().tolist():
            up = min(max(1.2 / (1 + math.exp(-logit)) - 0.1, 0.0), 1.0)
            expected += 0.01 * (1 - abs(2 * up - 1) ** beta)
        assert float(_rounding_penalty([soft], progress).detach()) == pytest.approx(expected, rel=1e-4)


def of_golden(case):
    """The layer of a case with soft rounding on the grid of the authors' code, and the values as tensors."""
    golden = {key: torch.tensor(value) for key, value in case.items() if isinstance(value, list)}
    outputs, inputs, *kernel = golden["weight"].shape
    how, bias = case["convolution"], "bias" in golden
    layer = nn.Conv2d(inputs * how["groups"], outputs, kernel, bias=bias, **how) if how else nn.Linear(inputs, outputs)
    layer.weight.data = golden["weight"]
    if bias:
        layer.bias.data = golden["bias"]
    channels = len(golden["scale"]) if len(golden["scale"]) > 1 else None
    quantizer = FakeQuantize(Grid.unsigned(case["bits"]), channels)
    parametrize.register_parametrization(layer, "weight", quantizer)
    quantizer.set_grid(*(golden[key] if channels else golden[key][0] for key in ("scale", "zero_point")))
    return _SoftRounding(layer, quantizer), golden


BRECQ = pytest.mark.parametrize("case", GOLDEN["cases"].values(), ids=GOLDEN["cases"])


@BRECQ
def test_soft_and_hard_weights_equal_those_of_the_brecq_code(case):
    soft, golden = of_golden(case)
    between = (
        golden["weight"] / soft.scale - soft.floor - 0.5
    ).abs() < 0.499  # ours do not start on the points of the grid
    assert between.float().mean() > 0.98
    torch.testing.assert_close(soft.logits[between], golden["alpha_at_start"][between], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(soft.weight(soft.h())[between], golden["weight_at_start"][between], rtol=0, atol=1e-5)
    soft.logits.data = golden["alpha"]
    torch.testing.assert_close(soft.weight(soft.h()), golden["soft"], rtol=0, atol=1e-5)
    torch.testing.assert_close(soft.weight((soft.h() >= 0.5).float()), golden["hard"], rtol=0, atol=1e-5)
    torch.testing.assert_close(soft(golden["values"]), golden["answers"], rtol=0, atol=1e-5)


@BRECQ
def test_the_loss_equals_that_of_the_brecq_code(case):
    soft, golden = of_golden(case)
    soft.logits.data = golden["alpha"]
    for count, expected in case["losses"].items():
        loss = _error(soft(golden["values"]), golden["target"]) + _rounding_penalty(
            [soft], int(count) / GOLDEN["iterations"]
        )
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
        if count in case["gradients"]:
            (found,) = torch.autograd.grad(loss, soft.logits)
            torch.testing.assert_close(found, torch.tensor(case["gradients"][count]), rtol=1e-4, atol=1e-6)


@ALL
def test_every_weight_ends_on_one_of_the_two_points_next_to_it(how):
    quantizers, _ = calibrated()
    before = {name: parametrized(quantizers.graph.get_submodule(name)).original.clone() for name in quantizers.layers}
    original = copy.deepcopy(quantizers.graph)
    for name in quantizers.layers:
        original.get_submodule(name).parametrizations.weight[0].enabled = False
    for name in quantizers.activations:
        original.get_submodule(name).enabled = False
    reconstruct(quantizers, original, images(), how)
    moved = 0
    for name in quantizers.layers:
        layer = quantizers.graph.get_submodule(name)
        quantizer = quantizers.of_weight(name)
        assert quantizers.is_on_grid(name)
        scale = quantizer.scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
        steps = before[name].detach() / scale
        found = (layer.weight / scale).round()
        ends = quantizer.grid.minimum, quantizer.grid.maximum
        down, up = (each.clamp(*ends) for each in (steps.floor(), steps.floor() + 1))
        assert ((found == down) | (found == up)).all()
        moved += int((found != steps.round().clamp(*ends)).sum())
    assert moved > 20, "some are rounded to the point that is further away"


@ALL
def test_learned_rounding_has_a_smaller_error_than_nearest_rounding(how):
    quantizers, original = calibrated()
    fresh = images(256, seed=7)
    truth = original(fresh).detach()

    def error():
        return float((quantizers.graph(fresh).detach() - truth).square().mean())

    nearest = error()
    reconstruct(quantizers, original, images(256), how)
    assert error() < 0.4 * nearest


def test_steps_of_activations_are_learned_only_with_learn_steps():
    for how, learns in ((LAYERS, False), (BLOCKS, True), (DROPPING, True)):
        quantizers, original = calibrated()
        before = {name: float(quantizers.of_activation(name).scale) for name in quantizers.activations}
        reconstruct(quantizers, original, images(), how)
        changed = [float(quantizers.of_activation(name).scale) != scale for name, scale in before.items()]
        assert all(changed) if learns else not any(changed)
        assert quantizers.enabled


def interrupt():
    raise KeyboardInterrupt


@ALL
def test_resuming_after_a_finished_part_is_bit_identical(how):
    whole, original = calibrated()
    progress = RecordedProgress()
    reconstruct(whole, original, images(), how, progress=progress)
    (task,) = progress.tasks
    assert task.done == sorted(task.done)
    assert task.done[-1] == task.total
    stopped, original = calibrated()
    with pytest.raises(KeyboardInterrupt):
        reconstruct(stopped, original, images(), how, checkpoint=interrupt)
    resumed, original = calibrated()
    resumed.graph.load_state_dict(stopped.graph.state_dict())
    rest = RecordedProgress()
    reconstruct(resumed, original, images(), how, progress=rest)
    assert len(rest.tasks[0].done) < len(task.done)
    expected = whole.graph.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.graph.state_dict().items())
    again = RecordedProgress()
    reconstruct(resumed, original, images(), how, progress=again)
    assert again.tasks == [], "nothing is left to do"


class TwoLayers(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def test_a_block_is_learned_even_if_one_of_its_layers_is_on_its_grid():
    quantizers, original = calibrated(TwoLayers().eval())
    weight = parametrized(quantizers.graph.get_submodule("conv1"))
    weight.original.data = weight[0](weight.original).detach()
    assert [quantizers.is_on_grid(name) for name in ("conv1", "conv2")] == [True, False]
    reconstruct(quantizers, original, images(), replace(BLOCKS, iterations=2))
    assert quantizers.is_on_grid("conv2")


class Widening(nn.Module):
    """With a shortcut that subsamples pixels and pads channels with zeros, as in ResNets for CIFAR."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def test_a_shared_step_is_learned_in_one_block_only():
    quantizers, original = calibrated(Widening().eval())
    (shared,) = {node.target for node in quantizers.graph.graph.nodes if node.kwargs.get("moved")}
    step = quantizers.of_activation(shared).scale
    found = [float(step)]
    reconstruct(quantizers, original, images(), DROPPING, checkpoint=lambda: found.append(float(step)))
    assert len(found) == 4, "one of each block behind the first one"
    assert found[0] != found[1], "learned"
    assert found[1:] == found[1:2] * 3, "what was fitted to it stays fitted, and a run that goes on sees the same"


def test_masked_weights_stay_zero_and_unchanged():
    model = Small().eval()
    mask = Mask(model.conv2.weight.shape)
    mask.mask[:, ::2] = False
    parametrize.register_parametrization(model.conv2, "weight", mask)
    before = parametrized(model.conv2).original.detach().clone()
    quantizers, original = calibrated(model)
    reconstruct(quantizers, original, images(), LAYERS)
    layer = quantizers.graph.get_submodule("conv2")
    assert (layer.weight[:, ::2] == 0).all()
    assert torch.equal(parametrized(layer).original[:, ::2], before[:, ::2])
    assert not torch.equal(parametrized(layer).original[:, 1::2], before[:, 1::2])


def test_only_weights_and_steps_change():
    quantizers, original = calibrated()
    before = {key: value.clone() for key, value in quantizers.graph.state_dict().items()}
    reconstruct(quantizers, original, images(), DROPPING)
    for key, value in quantizers.graph.state_dict().items():
        if not key.endswith(("weight.original", "scale")):
            assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in quantizers.graph.parameters())
