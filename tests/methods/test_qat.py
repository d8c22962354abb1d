from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.core.target import Target
from tersor.data.batch import Batch
from tersor.deploy.onnx import export
from tersor.evaluation.session import open_session
from tersor.graph.parametrization import parametrized
from tersor.methods.adaround import AdaRound
from tersor.methods.ptq import PTQ
from tersor.methods.qat import QAT
from tersor.methods.weight_pruning import WeightPruning
from tersor.pruning.mask import weight_mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.range_tracking import MovingAverage
from tersor.training.context import AttachContext
from tersor.training.loop import fit
from tersor.training.method import chain
from tersor.training.options import OptimizerOptions, Training

VNNI = Target(cpu="vnni")


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


class Loader:
    def __init__(self, count=4, seed=1):
        draw = torch.Generator().manual_seed(seed)
        self.batches = [
            Batch(torch.randn(12, 3, 8, 8, generator=draw), torch.randint(0, 5, (12,), generator=draw))
            for _ in range(count)
        ]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    def set_epoch(self, epoch):
        pass


def attached(model=None, method=None, steps=8, target=VNNI):
    found = (method or QAT()).attach(model or Small().eval(), AttachContext(data=Loader(), steps=steps, target=target))
    found.begin()
    return found


def trained(method=None, steps=8, model=None, rate=0.05):
    found = attached(model, method, steps)
    fit(found, Loader(), Training(optimizer=OptimizerOptions(learning_rate=rate)), steps=steps)
    found.finish()
    return found.model


def edges(graph):
    quantizers = (module for module in graph.modules() if isinstance(module, FakeQuantize))
    return [each for each in quantizers if isinstance(each.observer, MovingAverage)]


def test_before_the_first_step_it_is_what_post_training_quantization_gives():
    ours = attached(method=QAT(bits=4)).model.eval()
    without = {"bias_correction": False, "variance_correction": False}
    theirs = PTQ(bits=4, weight_range="minmax", activation_range="minmax", **without).attach(
        Small().eval(), AttachContext(data=Loader(), target=VNNI)
    )
    theirs.begin()
    images = Loader(1, seed=5).batches[0].images
    assert torch.equal(ours(images), theirs.model(images))


def test_the_gradient_is_passed_through_inside_the_range_only():
    graph = attached(method=QAT(bits=3)).model.eval()
    edge = edges(graph)[0]
    values = torch.linspace(-3 * float(edge.observer.high), 3 * float(edge.observer.high), 101, requires_grad=True)
    edge(values).sum().backward()
    low, high = (float((end - edge.zero_point) * edge.scale) for end in (0, 255))
    half = float(edge.scale) / 2
    expected = [1.0 if low - half <= value <= high + half else 0.0 for value in values.tolist()]
    assert values.grad.tolist() == expected
    layer = graph.get_submodule("conv2")
    layer.weight.square().sum().backward()
    assert torch.allclose(layer.parametrizations.weight.original.grad, 2 * layer.weight)


def test_scales_are_recomputed_from_the_weights_after_every_step():
    graph = trained(QAT(bits=4, first_last_bits=4))
    for name in ("conv1", "conv2", "linear"):
        layer = graph.get_submodule(name)
        original = layer.parametrizations.weight.original
        scale = layer.parametrizations.weight[0].scale
        for channel, each in zip(original.detach(), scale, strict=True):
            assert float(each) == pytest.approx(float(channel.abs().max()) / 7)
        assert all(len(channel.unique()) <= 15 for channel in layer.weight)


@pytest.mark.parametrize(
    "before",
    [
        PTQ(bits=3, weight_range="mse"),
        PTQ(bits=3, weight_range="mse", symmetric=False),
        pytest.param(AdaRound(bits=3), marks=pytest.mark.slow),
    ],
)
def test_clipping_of_an_earlier_stage_is_kept_relative_to_the_largest_weight(before):
    graph = attached(method=before).model
    images = Loader(1, seed=5).batches[0].images
    expected = graph.eval()(images)
    found = QAT().attach(graph, AttachContext(steps=8, target=VNNI))
    found.begin()
    found.after_step(0, None)  # the weights have not moved, so nothing changes
    torch.testing.assert_close(found.model.eval()(images), expected, rtol=1e-4, atol=1e-5)
    layer = found.model.get_submodule("conv2")
    quantizer = layer.parametrizations.weight[0]
    scale, share = quantizer.scale.clone(), quantizer.observer.share.clone()
    parametrized(layer).original.data *= 3
    found.after_step(1, None)
    torch.testing.assert_close(quantizer.scale, 3 * scale)
    assert torch.equal(quantizer.observer.share, share)
    assert (share < 1).any() or isinstance(before, AdaRound), "whose weights end where its grid does"


def test_a_channel_of_zeros_can_recover_its_full_range():
    graph = attached(method=PTQ(bits=3, weight_range="mse")).model
    parametrized(graph.get_submodule("conv2")).original.data[2] = 0  # rounding can produce such channels
    found = QAT().attach(graph, AttachContext(steps=8, target=VNNI))
    found.begin()
    layer = found.model.get_submodule("conv2")
    parametrized(layer).original.data[2] = 0.5
    found.after_step(0, None)
    assert torch.allclose(layer.weight[2], torch.full_like(layer.weight[2], 0.5))


def test_ranges_are_moving_averages_of_the_batch_ranges():
    found = attached(method=QAT(averaging=0.25))
    edge = edges(found.model)[0]  # quantizes the images: its input does not change in training
    low, high = float(edge.observer.low), float(edge.observer.high)
    fit(found, Loader(), Training(), steps=6)
    for step in range(6):
        images = Loader().batches[step % 4].images
        low += 0.25 * (float(images.min()) - low)
        high += 0.25 * (float(images.max()) - high)
    assert float(edge.observer.low) == pytest.approx(low, rel=1e-5)
    assert float(edge.observer.high) == pytest.approx(high, rel=1e-5)
    assert float(edge.scale) == pytest.approx((high - low) / 255, rel=1e-5)


def test_a_range_is_updated_only_once_per_batch():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.other, self.linear = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = F.relu(self.conv(x))
            x = F.pad(self.other(x), (1, 1, 1, 1))[:, :, ::2, ::2] + x[:, :, ::2, ::2]
            return self.linear(x.mean((2, 3)))

    found = attached(Sliced().eval(), QAT(averaging=0.5))
    graph = found.model.train()
    shared = [node for node in graph.graph.nodes if node.op == "call_module" and node.kwargs]
    assert shared, "a slice hands the range of its input on"
    edge = graph.get_submodule(shared[0].target)
    seen = []
    hook = edge.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].max().item()))
    before = float(edge.observer.high)
    graph(3 * Loader(1).batches[0].images)
    hook.remove()
    assert len(seen) > 1
    assert float(edge.observer.high) == pytest.approx(0.5 * before + 0.5 * seen[0], rel=1e-5)
    assert torch.isfinite(rebuilt(found.model, Sliced())(Loader(1).batches[0].images)).all()


def rebuilt(model, fresh):
    again = rebuild(fresh, json.loads(json.dumps(structure(model))))
    again.load_state_dict(model.state_dict())
    moved = [[node.kwargs for node in each.graph.nodes if node.op == "call_module"] for each in (model, again)]
    assert moved[0] == moved[1]
    return again.eval()


def test_ranges_are_fixed_after_the_end_even_in_training_mode():
    graph = trained()
    before = copy.deepcopy(graph.state_dict())
    graph.train()
    graph(10 * Loader(1, seed=7).batches[0].images)
    for name, value in graph.state_dict().items():
        if name.startswith("quantizers."):
            assert torch.equal(value, before[name])


def test_ranges_are_fixed_in_eval_mode():
    found = attached()
    before = [float(edge.observer.high) for edge in edges(found.model)]
    found.model.eval()(10 * Loader(1).batches[0].images)
    assert [float(edge.observer.high) for edge in edges(found.model)] == before


def test_qat_reuses_the_grids_of_an_earlier_stage():
    first = PTQ(bits=4).attach(Small().eval(), AttachContext(data=Loader(), target=VNNI))
    first.begin()
    images = Loader(1, seed=5).batches[0].images
    before = first.model(images)
    second = QAT(bits=4).attach(first.model, AttachContext(steps=4, target=VNNI))
    second.begin()
    assert torch.allclose(second.model.eval()(images), before, atol=1e-5)
    fit(second, Loader(), Training(), steps=4)
    second.finish()
    assert torch.isfinite(second.model(images)).all()


def test_ptq_and_qat_can_be_combined_in_one_stage():
    found = chain([PTQ(bits=4), QAT(bits=4)], Small().eval(), AttachContext(data=Loader(), steps=4, target=VNNI))
    found.begin()
    assert all(edge.enabled and float(edge.observer.high) > 0 for edge in edges(found.model))


def test_settings_that_differ_from_an_earlier_stage_raise():
    first = PTQ(bits=4).attach(Small().eval(), AttachContext(data=Loader(), target=VNNI))
    first.begin()
    with pytest.raises(InputError, match=r"bits: 6, but an earlier stage .* to 4 bits\. Leave out bits"):
        QAT(bits=6).attach(first.model, AttachContext(steps=4))
    with pytest.raises(InputError) as raised:
        QAT(activation_bits=4).attach(first.model, AttachContext(steps=4))
    assert str(raised.value) == (
        "qat has activation_bits: 4, but an earlier stage has quantized the network to 8 bits. Leave out "
        "activation_bits to keep those bits, or write the same activation_bits in the earlier stage."
    )
    with pytest.raises(InputError, match=r"first_last_bits: 4, but an earlier stage .* to 8 bits"):
        QAT(first_last_bits=4).attach(first.model, AttachContext(steps=4))
    with pytest.raises(InputError, match="per_channel: false, but an earlier stage has quantized"):
        QAT(per_channel=False).attach(first.model, AttachContext(steps=4))
    with pytest.raises(InputError, match="Write `exclude` in that stage"):
        QAT(bits=4, exclude=("conv1",)).attach(first.model, AttachContext(steps=4))


def test_grids_of_an_earlier_stage_are_kept_by_default():
    first = PTQ(bits=3, activation_bits=5, symmetric=False, per_channel=False, exclude=("conv1",))
    laid = first.attach(Small().eval(), AttachContext(data=Loader(), target=VNNI))
    laid.begin()
    found = QAT().attach(laid.model, AttachContext(steps=4, target=VNNI))
    found.begin()
    fit(found, Loader(), Training(), steps=4)
    found.finish()
    layer = found.model.get_submodule("conv2")
    (quantizer,) = layer.parametrizations.weight
    assert (quantizer.grid, quantizer.scale.ndim) == (Grid.full(3), 0)
    weight = layer.parametrizations.weight.original
    span = float(quantizer.observer.share) * float((weight.max() - weight.min()).detach())
    assert float(quantizer.scale) == pytest.approx(span / 7, rel=1e-4)
    assert not hasattr(found.model.get_submodule("conv1"), "parametrizations")
    assert {edge.grid.bits for edge in edges(found.model)} == {5, 8}


def norms(graph):
    return [module for module in graph.modules() if isinstance(module, nn.BatchNorm2d)]


def test_frozen_statistics_and_ranges_are_fixed_while_gamma_trains():
    found = attached(method=QAT(freeze_norm_at=0.5, freeze_ranges_at=0.75), steps=8)
    seen = []

    class Looks(NullProgress):
        def advance(self, amount=1, **shown):
            norm, edge = norms(found.model)[0], edges(found.model)[0]
            seen.append((norm.running_mean.clone(), norm.weight.detach().clone(), float(edge.observer.high)))

    fit(found, Loader(), Training(optimizer=OptimizerOptions(learning_rate=0.05)), steps=8, progress=Looks())
    means, gammas, highs = zip(*seen, strict=True)
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(means)]
    assert moved == [True, True, True, False, False, False, False]
    assert all(not torch.equal(*pair) for pair in itertools.pairwise(gammas))
    assert [first != second for first, second in itertools.pairwise(highs)] == [True] * 5 + [False] * 2


def test_statistics_can_be_frozen_from_the_first_step():
    model = Small().eval()
    before = [norm.running_var.clone() for norm in norms(model)]
    graph = trained(QAT(freeze_norm_at=0), model=model)
    assert all(torch.equal(norm.running_var, was) for norm, was in zip(norms(graph), before, strict=True))


def test_missing_images_raise():
    with pytest.raises(InputError, match="qat needs images to calibrate with"):
        QAT().attach(Small().eval(), AttachContext(steps=4))
    with pytest.raises(InputError, match="qat needs images, and the data contains none"):
        QAT().attach(Small().eval(), AttachContext(data=[], steps=4))


def test_masked_weights_stay_zero_when_quantized():
    methods = [WeightPruning(sparsity=0.8, sparsity_schedule="cubic", every=1), QAT(bits=4, first_last_bits=4)]
    found = chain(methods, Small().eval(), AttachContext(data=Loader(), steps=8, target=VNNI))
    found.begin()
    fit(found, Loader(), Training(optimizer=OptimizerOptions(learning_rate=0.05)), steps=8)
    found.finish()
    for name in ("conv1", "conv2"):
        layer = found.model.get_submodule(name)
        masked = ~weight_mask(layer).mask
        assert masked.float().mean() == pytest.approx(0.8, abs=0.01)
        assert (layer.weight[masked] == 0).all()
        scale = next(each for each in layer.parametrizations.weight if isinstance(each, FakeQuantize)).scale
        kept = layer.parametrizations.weight.original.detach().masked_fill(masked, 0).abs().flatten(1).amax(1)
        assert torch.allclose(
            scale, torch.where(kept > 0, kept / 7, 1.0)
        )  # computed from the remaining weights, not the masked ones


def test_the_moving_average_of_the_weights_gets_its_own_scales():
    found = attached(method=QAT(bits=4, first_last_bits=4))
    fit(found, Loader(), Training(optimizer=OptimizerOptions(learning_rate=0.1), ema=0.9), steps=8)
    found.finish()
    layer = found.model.get_submodule("conv1")
    expected = layer.parametrizations.weight.original.detach().abs().flatten(1).amax(1) / 7
    assert torch.allclose(layer.parametrizations.weight[0].scale, expected)


def test_training_reduces_the_loss_of_post_training_quantization():
    alone, learned = (
        attached(method=QAT(bits=4, activation_bits=4)).model.eval(),
        trained(QAT(bits=4, activation_bits=4), steps=120),
    )
    before, after = (
        sum(float(F.cross_entropy(model(batch.images), batch.targets).detach()) for batch in Loader())
        for model in (alone, learned)
    )
    assert after < 0.75 * before


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_exported_file_agrees_with_the_trained_network(tmp_path, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    found = QAT().attach(Small().eval(), AttachContext(data=Loader(), steps=20, target=Target(runtime=runtime)))
    found.begin()
    fit(found, Loader(), Training(optimizer=OptimizerOptions(learning_rate=0.02)), steps=20)
    found.finish()
    images = Loader(1, seed=9).batches[0].images
    session = open_session(export(found.model, images, tmp_path / "model.onnx"), runtime)
    given = torch.from_numpy(session.run(images.numpy()))
    assert torch.allclose(given, found.model(images).detach(), atol=0.05)
    assert (given.argmax(1) == found.model(images).argmax(1)).all()


def test_under_bfloat16_autocast_all_levels_are_kept():
    edge = FakeQuantize(Grid.unsigned(8)).track_activations(0.01)
    edge.set_range(torch.tensor(0.0), torch.tensor(3.7))
    with torch.autocast("cpu", torch.bfloat16):
        shown = edge(torch.linspace(0, 3.7, 5000))
    assert shown.dtype == torch.float32
    assert len(shown.unique()) == 256
