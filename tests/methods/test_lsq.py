from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_qat import VNNI, Loader, Small, norms

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation.session import open_session
from tersor.methods.lsq import LSQ, first_step
from tersor.methods.ptq import PTQ
from tersor.methods.qat import QAT
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.observers import Histogram
from tersor.training.context import AttachContext
from tersor.training.loop import fit
from tersor.training.options import OptimizerOptions, Training


def attached(method=None, model=None, steps=8):
    found = (method or LSQ(bits=4, activation_bits=4)).attach(
        model or Small().eval(), AttachContext(data=Loader(), steps=steps, target=VNNI)
    )
    found.begin()
    return found


def trained(method=None, steps=8, rate=0.05):
    found = attached(method, steps=steps)
    fit(found, Loader(), Training(optimizer=OptimizerOptions(learning_rate=rate)), steps=steps)
    found.finish()
    return found.model


def test_initial_steps_are_computed_from_weights_and_ranges():
    model = Small().eval()
    graph = attached(model=model).model
    layer = graph.get_submodule("conv2")
    (quantizer,) = layer.parametrizations.weight
    for row, step in zip(layer.parametrizations.weight.original, quantizer.scale.tolist(), strict=True):
        assert step == pytest.approx(2 * float(row.detach().abs().mean()) / 7**0.5, rel=1e-5)
    images = torch.cat([batch.images for batch in Loader()])
    histogram = Histogram()
    histogram.widen(images)
    histogram.count(images)
    low, high = histogram.least_squares(Grid.unsigned(8))
    edge = graph.get_submodule("quantizers.x")
    assert float(edge.scale.detach()) == pytest.approx(float(high - low) / 255, rel=1e-4)


def test_without_per_channel_there_is_one_step_per_layer_as_in_the_paper():
    weight = torch.randn(4, 3, 3, 3)
    assert first_step(weight, Grid.signed(2), per_channel=False).shape == ()
    graph = attached(LSQ(bits=2, per_channel=False)).model
    assert graph.conv2.parametrizations.weight[0].scale.ndim == 0


def test_steps_are_learned_and_then_fixed():
    found = attached(LSQ(bits=4, activation_bits=4, offset=True))
    before = {
        name: (each.scale.detach().clone(), each.zero_point.detach().clone())
        for name, each in found.model.named_modules()
        if isinstance(each, FakeQuantize) and each.learned_step is not None
    }
    assert len(before) >= 6
    fit(found, Loader(), Training(optimizer=OptimizerOptions(learning_rate=0.5)), steps=8)
    learned = {name: found.model.get_submodule(name).scale.detach().clone() for name in before}
    shown = found.model.eval()(Loader(1, seed=3).batches[0].images)
    found.finish()
    assert all(not torch.equal(learned[name], scale) for name, (scale, _) in before.items())
    for name, scale in learned.items():
        quantizer = found.model.get_submodule(name)
        assert type(quantizer) is FakeQuantize
        assert torch.equal(quantizer.scale, scale)
        assert quantizer.zero_point.dtype == torch.int32
    assert torch.allclose(found.model(Loader(1, seed=3).batches[0].images), shown, atol=1e-5)
    assert {type(each) for each in found.model.parameters()} == {torch.nn.Parameter}
    assert not any(name.endswith("scale") for name, _ in found.model.named_parameters())


def test_training_starts_from_the_grids_of_an_earlier_stage():
    first = PTQ(bits=4, activation_bits=4, activation_range="mse").attach(
        Small().eval(), AttachContext(data=Loader(), target=VNNI)
    )
    first.begin()
    images = Loader(1, seed=5).batches[0].images
    before = first.model(images)
    with pytest.raises(InputError, match=r"lsq has bits: 2, but an earlier stage has quantized the network to 4 bits"):
        LSQ(bits=2).attach(first.model, AttachContext(steps=4, target=VNNI))
    second = LSQ().attach(first.model, AttachContext(steps=4, target=VNNI))
    second.begin()
    assert torch.allclose(second.model.eval()(images), before, atol=1e-5)
    with pytest.raises(InputError, match=r"trains the grids already\. Write either qat or lsq"):
        QAT().attach(second.model, AttachContext(steps=4, target=VNNI))


def test_norm_statistics_can_be_frozen_from_the_first_step():
    model = Small().eval()
    before = [norm.running_var.clone() for norm in norms(model)]
    found = attached(LSQ(bits=4, freeze_norm_at=0), model)
    fit(found, Loader(), Training(), steps=4)
    assert all(torch.equal(norm.running_var, was) for norm, was in zip(norms(found.model), before, strict=True))


@pytest.mark.parametrize("offset", [False, True])
def test_training_reduces_the_loss_of_post_training_quantization(offset):
    method = LSQ(bits=4, activation_bits=4, offset=offset)
    before, after = (
        sum(float(F.cross_entropy(model(batch.images), batch.targets).detach()) for batch in Loader())
        for model in (attached(method).model.eval(), trained(method, steps=120, rate=0.1).eval())
    )
    assert after < 0.7 * before


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_learned_ranges_are_exported_unchanged(tmp_path, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    graph = trained(LSQ(bits=4, activation_bits=8, offset=True), steps=20)
    images = Loader(1, seed=9).batches[0].images
    session = open_session(export(copy.deepcopy(graph), images, tmp_path / "model.onnx"), runtime)
    given = torch.from_numpy(session.run(images.numpy()))
    expected = graph.eval()(images).detach()
    alike = ((given - expected).abs() <= 0.05 * expected.std()).all(1)
    assert (
        alike.float().mean() >= 0.9
    )  # a value near the middle of two grid points can be rounded differently in the file


def test_missing_images_raise():
    with pytest.raises(InputError, match="lsq needs images to calibrate with"):
        LSQ().attach(Small().eval(), AttachContext(steps=4))


def test_on_saturating_processors_learned_steps_stay_large_enough_for_two_products():
    def pairs(target):
        found = LSQ(bits=8, freeze_norm_at=0.5).attach(
            Small().eval(), AttachContext(data=Loader(), steps=6, target=target)
        )
        found.begin()
        for name in ("conv1", "conv2"):  # a step that became too small in training
            found.quantizers.of_weight(name).scale.data.mul_(0.05)
        fit(found, Loader(), Training(optimizer=OptimizerOptions(learning_rate=0.05)), steps=6)
        found.finish()
        layers = [found.model.get_submodule(name) for name in ("conv1", "conv2", "linear")]
        sizes = [
            (layer.weight.detach().flatten(1) / layer.parametrizations.weight[0].scale[:, None]).abs().round()
            for layer in layers
        ]
        return max(float(each.topk(2).values.sum(1).max()) for each in sizes), found.notes

    largest, notes = pairs(Target(cpu="avx2"))
    assert largest <= 128
    assert "saturate" in notes[0]
    largest, notes = pairs(VNNI)
    assert largest > 128
    assert notes == ()
