from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from recorded_progress import RecordedProgress, Task
from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.batch import Batch
from tersor.deploy.onnx import export
from tersor.graph.parametrization import strip
from tersor.methods.ptq import PTQ, PTQAttachment
from tersor.models import build
from tersor.quantization.fake_quantize import FakeQuantize, weight_quantizer
from tersor.quantization.grid import Grid, affine_parameters
from tersor.quantization.observers import Histogram
from tersor.training.context import AttachContext

VNNI = Target(cpu="vnni")
AVX2 = Target(cpu="avx2")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x + self.bn2(self.conv2(x))
        return self.linear(F.relu(x).mean((2, 3)))


def images(count=12, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def calibrated(model=None, method=None, data=None, target=VNNI):
    attached = (method or PTQ()).attach(
        model or Small().eval(), AttachContext(data=[images()] if data is None else data, target=target)
    )
    attached.begin()
    return attached


def quantizers(graph):
    return {name: module for name, module in graph.named_modules() if isinstance(module, FakeQuantize)}


def test_attach_changes_no_output_and_no_parameter():
    model = Small().eval()
    before = model(images())
    parameters = {id(parameter) for parameter in model.parameters()}
    state = torch.random.get_rng_state()
    attached = PTQ().attach(model, AttachContext(data=[images()]))
    assert torch.equal(attached.model(images()), before)
    assert {id(parameter) for parameter in attached.model.parameters()} == parameters
    assert torch.equal(torch.random.get_rng_state(), state)
    assert attached.terms == ()
    assert attached.label_weight == 1


def test_calibrated_weights_are_on_their_grids():
    graph = calibrated(method=PTQ(bits=4, first_last_bits=4, weight_range="minmax")).model
    for name in ("conv1", "conv2", "linear"):
        layer = graph.get_submodule(name)
        for channel, original in zip(layer.weight, layer.parametrizations.weight.original, strict=True):
            scale = original.abs().max().item() / 7
            expected = [min(max(round(value / scale), -7), 7) * scale for value in original.flatten().tolist()]
            assert channel.flatten().tolist() == pytest.approx(expected, abs=1e-6)
            assert len(channel.unique()) <= 15


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_activations_have_at_most_two_to_the_bits_levels(bits):
    graph = calibrated(method=PTQ(activation_bits=bits, first_last_bits=bits)).model
    seen = {}
    for name, module in quantizers(graph).items():
        if name.startswith("quantizers"):
            module.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}) or None)
    graph(images(64, seed=9) * 3)
    assert len(seen) >= 4
    assert all(len(values.unique()) <= 2**bits for values in seen.values())


def test_ranges_are_the_minimum_and_maximum_of_each_quantized_value():
    model = Small().eval()
    batches = [images(4, seed) for seed in range(3)]
    x = torch.cat(batches)
    with torch.no_grad():
        first = F.relu(model.bn1(model.conv1(x)))
        second = model.bn2(model.conv2(first))
        last = F.relu(first + second)
    expected = {"x": x, "relu": first, "bn2": second, "relu_1": last, "mean": last.mean((2, 3))}
    graph = calibrated(model, data=batches).model
    found = {name.removeprefix("quantizers."): q for name, q in quantizers(graph).items() if name.startswith("quant")}
    assert list(found) == list(expected)
    for name, values in expected.items():
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        assert found[name].scale.item() == pytest.approx((high - low) / 255, rel=1e-5)
        assert found[name].zero_point.item() == round(-low / ((high - low) / 255))


@pytest.mark.parametrize("kind", ["percentile", "mse", "entropy"])
def test_other_activation_ranges_are_computed_from_the_histogram(kind):
    batches = [images(6, seed) for seed in range(2)]
    graph = calibrated(
        method=PTQ(activation_range=kind, percentile=95, activation_bits=4, first_last_bits=4), data=batches
    ).model
    histogram = Histogram()
    histogram.widen(torch.cat(batches))
    histogram.count(torch.cat(batches))
    grid = Grid.unsigned(4)
    ranges = {
        "percentile": histogram.percentile(95),
        "mse": histogram.least_squares(grid),
        "entropy": histogram.least_divergence(grid),
    }
    scale, zero_point = affine_parameters(*ranges[kind], grid)
    found = graph.get_submodule("quantizers.x")
    torch.testing.assert_close(found.scale, scale)
    assert found.zero_point == zero_point
    if kind != "entropy":  # for normal numbers, entropy keeps the full range
        assert found.scale * 15 < images(6, 0).max() - images(6, 0).min(), "it clips"


class Padded(nn.Module):
    """The output of the first convolution is used twice: unchanged, and padded with zeros; both have the same grid."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = F.relu(self.first(x) + 1)
        return self.second(x) + self.third(F.pad(x, (1, 1, 1, 1)))


def test_values_that_are_only_rearranged_are_counted_once():
    model = Padded().eval()
    graph = calibrated(model, PTQ(activation_range="percentile", percentile=90)).model
    histogram = Histogram()
    values = F.relu(F.conv2d(images(), model.first.parametrizations.weight.original, model.first.bias) + 1).detach()
    histogram.widen(values)
    histogram.count(values)
    scale, _ = affine_parameters(*histogram.percentile(90), Grid.unsigned(8))
    torch.testing.assert_close(graph.get_submodule("quantizers.relu").scale, scale)
    assert [node.target for node in graph.graph.nodes].count("quantizers.relu") == 2


def test_the_projections_of_attention_are_quantized():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            x = x.flatten(2)[:, :, :8]
            y, _ = self.attention(x, x, x)
            return self.last(y)

    torch.manual_seed(0)
    model = Attentive().eval()
    keys, before = set(model.state_dict()), model(images())
    attached = calibrated(model, PTQ(bits=4))
    graph = attached.model
    assert set(attached.quantizers.layers) == {"attention.in_proj", "attention.out_proj", "last"}
    bits = {name: weight_quantizer(graph.get_submodule(name)).grid.bits for name in attached.quantizers.layers}
    assert bits == {"attention.in_proj": 8, "attention.out_proj": 4, "last": 8}
    assert graph.get_submodule("attention.in_proj").parametrizations.weight.original is model.attention.in_proj_weight
    assert 0 < (graph(images()) - before).abs().max() < 0.2 * before.std()
    assert {key for key in strip(graph).state_dict() if not key.startswith("quantizers.")} == keys


def test_the_mse_range_has_a_smaller_rounding_error_for_weights():
    def error(weight_range):
        graph = calibrated(method=PTQ(bits=3, weight_range=weight_range)).model
        return sum(
            (layer.weight - layer.parametrizations.weight.original).square().sum().item()
            for layer in (graph.conv1, graph.conv2, graph.linear)
        )

    assert error("mse") < error("minmax")


@pytest.mark.parametrize(
    ("left", "written"),
    [
        ({}, {"weight_range": "output_mse", "activation_range": "minmax", "variance_correction": False}),
        ({"bits": 4}, {"weight_range": "mse", "activation_range": "mse", "variance_correction": True}),
        ({"activation_bits": 4}, {"weight_range": "output_mse", "activation_range": "mse"}),
        ({"bits": 4, "variance_correction": False}, {"weight_range": "minmax", "activation_range": "mse"}),
    ],
)
def test_default_options_depend_on_the_bits(left, written):
    found = (
        calibrated(method=PTQ(**left)).model(images()),
        calibrated(method=PTQ(**{**left, **written})).model(images()),
    )
    assert torch.equal(*found)


def test_without_batchnorm_the_default_range_is_minmax():
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()

    options_written = {"weight_range": "minmax", "variance_correction": False}
    found = [calibrated(plain(), PTQ(bits=4, **options)).model(images()) for options in ({}, options_written)]
    assert torch.equal(*found)


def test_first_and_last_layers_have_their_own_bits():
    found = quantizers(calibrated(method=PTQ(bits=3, activation_bits=4, first_last_bits=6)).model)
    bits = {
        name.split(".parametrizations")[0].removeprefix("quantizers."): each.grid.bits for name, each in found.items()
    }
    assert bits == {"conv1": 6, "conv2": 3, "linear": 6, "x": 6, "relu": 4, "bn2": 4, "relu_1": 4, "mean": 6}


def test_without_per_channel_a_weight_has_one_scale():
    graph = calibrated(method=PTQ(bits=4, first_last_bits=4, per_channel=False, weight_range="minmax")).model
    for name in ("conv1", "conv2", "linear"):
        layer = graph.get_submodule(name)
        original = layer.parametrizations.weight.original
        scale = original.abs().max().item() / 7
        assert weight_quantizer(layer).scale.shape == ()
        assert weight_quantizer(layer).scale.item() == pytest.approx(scale)
        expected = [min(max(round(value / scale), -7), 7) * scale for value in original.flatten().tolist()]
        assert layer.weight.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def one_sided():
    """A network with almost only positive weights."""
    model = Small().eval()
    for layer in (model.conv1, model.conv2, model.linear):
        layer.weight.data.abs_().sub_(0.02)
    return model


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("weight_range", ["minmax", "percentile", "mse"])
def test_affine_grids_reduce_the_error_of_one_sided_weights(weight_range, per_channel):
    errors = {}
    for symmetric in (True, False):
        method = PTQ(
            bits=4,
            first_last_bits=4,
            symmetric=symmetric,
            weight_range=weight_range,
            percentile=99,
            per_channel=per_channel,
        )
        graph = calibrated(one_sided(), method).model
        layers = [graph.get_submodule(name) for name in ("conv1", "conv2", "linear")]
        for layer in layers:
            for channel in layer.weight if per_channel else [layer.weight]:
                assert len(channel.unique()) <= (15 if symmetric else 16)
        errors[symmetric] = [
            (layer.weight - layer.parametrizations.weight.original).square().sum().item() for layer in layers
        ]
    assert all(2 * affine < plain for affine, plain in zip(errors[False], errors[True], strict=True))


def test_affine_weights_with_8_bits_are_symmetric():
    affine, symmetric = (calibrated(one_sided(), PTQ(symmetric=each)).model.state_dict() for each in (False, True))
    assert all(torch.equal(value, symmetric[key]) for key, value in affine.items())


def test_the_percentile_range_clips_each_channel():
    graph = calibrated(method=PTQ(bits=4, first_last_bits=4, weight_range="percentile", percentile=80)).model
    for layer in (graph.conv1, graph.conv2, graph.linear):
        for scale, channel in zip(
            weight_quantizer(layer).scale.tolist(), layer.parametrizations.weight.original, strict=True
        ):
            ordered = sorted(channel.flatten().tolist())
            cut = round(0.1 * (len(ordered) - 1))  # a tenth on each side
            assert scale == pytest.approx(max(-ordered[cut], ordered[-1 - cut]) / 7)
            assert scale < channel.abs().max() / 7


def test_equalization_reduces_the_error():
    """Weights and the activations between them are scaled together; with 8 bits the outputs hardly change."""

    def found(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
        factors = torch.logspace(-2, 0, 6)
        model[0].weight.data.mul_(factors[:, None, None, None])
        model[0].bias.data.mul_(factors)
        model[2].weight.data.div_(factors[None, :, None, None])
        before = model(images())
        graph = calibrated(model, PTQ(**options)).model
        return graph, (graph(images()) - before).square().mean() / before.square().mean()

    graph, error = found(equalize=True, per_channel=False)
    made = graph.get_submodule("0").parametrizations.weight.original.abs().amax((1, 2, 3))
    read = graph.get_submodule("2").parametrizations.weight.original.abs().amax((0, 2, 3))
    torch.testing.assert_close(made, read, rtol=0.01, atol=0)
    assert error < 1e-3
    _, plain = found(per_channel=False, bits=4, first_last_bits=4)
    _, equalised = found(per_channel=False, bits=4, first_last_bits=4, equalize=True)
    assert equalised < plain / 4


def test_options_without_effect_are_noted():
    """The only pair of layers has a tanh in between, and neither layer has a bias."""
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False)).eval()
    method = PTQ(equalize=True, bias_correction=True)
    notes = calibrated(model, method, [torch.randn(4, 3, 8, 8)]).notes
    assert sum("changed nothing" in note for note in notes) == 2
    changed = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    assert not any("changed nothing" in note for note in calibrated(changed, method, [torch.randn(4, 3, 8, 8)]).notes)


def test_biases_are_corrected():
    """The mean of the remaining error is removed, also in the outputs."""

    def shift(**options):
        model = Small().eval()
        with torch.no_grad():
            return (
                (
                    calibrated(model, PTQ(bits=3, variance_correction=False, **options)).model(images())
                    - Small().eval()(images())
                )
                .mean(0)
                .abs()
                .max()
            )

    assert shift() < 1e-5
    assert shift(bias_correction=False) > 1e-3


class DoubledSteps(PTQAttachment):
    """Doubles the steps of the grids, in the hook or after `begin`."""

    hooked = True

    def set_weight_grids(self, images):
        super().set_weight_grids(images)
        if self.hooked:
            self.widen()

    def widen(self):
        for layer in self.quantizers.layers:
            self.quantizers.of_weight(layer).scale.mul_(2)


@pytest.mark.parametrize("hooked", [True, False])
def test_bias_correction_uses_the_grids_set_in_the_hook_of_a_method(hooked):
    made = PTQ(bits=3, variance_correction=False).attach(Small().eval(), AttachContext(data=[images()], target=VNNI))
    attached = DoubledSteps(made.method, made.quantizers, made.context)
    attached.hooked = hooked
    attached.begin()
    if not hooked:
        attached.widen()
    with torch.no_grad():
        shift = (attached.model(images()) - Small().eval()(images())).mean(0).abs().max()
    assert (shift < 1e-5) == hooked


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": False},
        {"symmetric": False, "per_channel": False, "weight_range": "mse"},
        {"per_channel": False},
        {"activation_range": "entropy", "weight_range": "percentile", "equalize": True, "bias_correction": True},
    ],
    ids=str,
)
def test_the_exported_file_agrees_with_the_network(options, tmp_path):
    model = one_sided()
    nn.init.uniform_(model.bn1.weight, -1.5, 1.5)  # after folding, some grids are mirrored
    nn.init.uniform_(model.bn2.weight, -1.5, 1.5)
    graph = calibrated(model, PTQ(bits=4, first_last_bits=4, **options)).model.eval()
    path = export(graph, images()[:2], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(64, seed=3)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = graph(x)
    off = (torch.from_numpy(found) - expected).abs()
    assert off.mean() < 0.02 * expected.std(), "but for values that lie between two points of a grid"


def test_integers_are_limited_on_saturating_processors_only():
    def pairs(target):
        graph = calibrated(target=target).model
        layers = [graph.conv1, graph.conv2, graph.linear]
        largest = [
            (layer.weight.flatten(1) / weight_quantizer(layer).scale[:, None]).abs().round().topk(2).values
            for layer in layers
        ]
        return torch.cat(largest)

    assert (pairs(VNNI)[:, 0] == 127).all()
    assert pairs(AVX2).sum(1).max() <= 128
    assert pairs(VNNI).sum(1).max() > 128


def test_layers_left_out_stay_in_float():
    attached = calibrated(method=PTQ(exclude=("conv2", "lin*")))
    graph = attached.model
    assert attached.quantizers.layers == ("conv1",)
    assert not parametrize.is_parametrized(graph.conv2)
    assert not parametrize.is_parametrized(graph.linear)
    assert set(attached.quantizers.activations) == {"quantizers.x", "quantizers.relu"}


def test_more_bits_reduce_the_error():
    model = Small().eval()
    x = images()
    with torch.no_grad():
        before = model(x)
        errors = [
            (calibrated(copy.deepcopy(model), PTQ(bits=b, activation_bits=b)).model(x) - before).abs().mean().item()
            for b in (2, 4, 6, 8)
        ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * before.std()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, torch.zeros(len(x))],
        lambda x: (x, torch.zeros(len(x)), "path"),
        lambda x: Batch(x),
        lambda x: Batch(x, torch.zeros(len(x), dtype=torch.int64)),
        lambda x: {"labels": torch.zeros(len(x), dtype=torch.int64), "pixel_values": x},
    ],
    ids=["tensor", "tuple of one", "list", "tuple of three", "Batch", "Batch with labels", "dict"],
)
def test_batches_with_and_without_labels_are_accepted(wrap):
    expected = calibrated(data=[images(4, 1), images(4, 2)]).model.state_dict()
    found = calibrated(data=[wrap(images(4, 1)), wrap(images(4, 2))]).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_data_loader_can_be_used_for_calibration():
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(), torch.zeros(12)), batch_size=5)
    found = calibrated(data=data).model.state_dict()
    expected = calibrated(data=[images()]).model.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_at_most_calibration_images_are_read():
    endless = (images(4, seed) for seed in iter(int, 1))
    progress = RecordedProgress()
    attached = PTQ(calibration_images=10).attach(Small().eval(), AttachContext(data=endless, progress=progress))
    attached.begin()
    assert progress.tasks == [Task("calibration", 10, [4, 8, 10])]
    expected = calibrated(data=[images(4, 0), images(4, 0), images(2, 0)])
    assert attached.model.get_submodule("quantizers.x").scale == expected.model.get_submodule("quantizers.x").scale


def test_two_passes_are_one_progress_task():
    data = [images(4), images(4)]
    progress = RecordedProgress()
    context = AttachContext(data=data, progress=progress)
    PTQ(calibration_images=8, activation_range="mse").attach(Small().eval(), context).begin()
    assert progress.tasks == [Task("calibration", 16, [4, 8, 12, 16])]


def test_an_empty_batch_is_ignored():
    found = calibrated(data=[images()[:0], images(), images()[:0]]).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in calibrated().model.state_dict().items())


def test_begin_does_nothing_a_second_time():
    attached = calibrated()
    before = {key: value.clone() for key, value in attached.model.state_dict().items()}
    attached.data = [images(seed=5) * 100]
    attached.begin()
    assert all(torch.equal(value, before[key]) for key, value in attached.model.state_dict().items())


def test_calibration_does_not_change_statistics_even_in_training_mode():
    model = Small().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = calibrated(model, PTQ(bias_correction=False)).model
    found = {key.replace("parametrizations.weight.original", "weight"): v for key, v in graph.state_dict().items()}
    assert all(torch.equal(found[key], value) for key, value in before.items())


def test_a_checkpoint_contains_the_calibration():
    saved = calibrated(method=PTQ(bits=5, activation_bits=6)).model
    torch.manual_seed(99)
    fresh = PTQ(bits=5, activation_bits=6).attach(Small().eval(), AttachContext(data=[100 * images()]))
    fresh.model.load_state_dict(saved.state_dict())
    fresh.begin()  # does nothing: it is calibrated already
    found = quantizers(fresh.model)
    for name, quantizer in quantizers(saved).items():
        assert found[name].enabled
        assert torch.equal(found[name].scale, quantizer.scale)
        assert torch.equal(found[name].zero_point, quantizer.zero_point)
    assert torch.equal(fresh.model(images()), saved(images()))


def test_strip_keeps_the_quantized_weights():
    graph = calibrated().model
    x = images(seed=7)
    before = graph(x)
    plain = strip(graph)
    assert torch.equal(plain(x), before)
    assert torch.equal(graph(x), before)
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    assert {"conv1.weight", "linear.weight"} <= set(plain.state_dict())


def test_a_channel_of_zeros_and_a_constant_zero_activation_are_quantized():
    model = Small().eval()
    with torch.no_grad():
        model.conv2.weight[0] = 0
        model.bn1.weight.zero_()
        model.bn1.bias.fill_(-1.0)  # everything after the first ReLU is zero
    graph = calibrated(model).model
    assert torch.isfinite(graph(images())).all()
    torch.testing.assert_close(graph.conv2.weight[0], torch.zeros(4, 3, 3))
    assert graph.get_submodule("quantizers.relu").scale == 1


def test_quantizers_are_placed_depending_on_the_runtime():
    onnxruntime = calibrated(target=Target(runtime="onnxruntime")).quantizers.activations
    openvino = calibrated(target=Target(runtime="openvino")).quantizers.activations
    assert set(openvino) < set(onnxruntime)


def test_gradients_pass_through_to_the_original_weights():
    graph = calibrated().model.train()
    graph(images()).square().sum().backward()
    originals = [parameter for name, parameter in graph.named_parameters() if name.endswith("original")]
    assert len(originals) == 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in originals)


# mistakes of users


def test_missing_data_raises():
    with pytest.raises(InputError, match=r"ptq needs images to calibrate with.*data="):
        PTQ().attach(Small(), AttachContext())


@pytest.mark.parametrize("data", [[], [images()[:0]]], ids=["no batch", "no image"])
def test_empty_data_raises(data):
    with pytest.raises(InputError, match="needs images, and the data contains none"):
        calibrated(data=data)


def test_data_that_can_be_read_only_once_raises_if_two_passes_are_needed():
    calibrated(data=iter([images()]))  # enough for one pass
    with pytest.raises(InputError, match=r"reads the data twice, but the data cannot be read again. Pass a DataLoader"):
        calibrated(method=PTQ(activation_range="mse"), data=iter([images()]))


def test_a_pattern_without_a_match_raises():
    with pytest.raises(InputError, match=r"'conv3' matches no layer\. Did you mean 'conv2'"):
        PTQ(exclude=("conv3",)).attach(Small(), AttachContext(data=[images()]))


def test_excluding_all_layers_raises():
    with pytest.raises(InputError, match=r"^exclude leaves ptq no layer to quantize\. Shorten exclude\.$"):
        PTQ(exclude=("*",)).attach(Small(), AttachContext(data=[images()]))


def test_a_network_without_quantizable_layers_raises():
    with pytest.raises(InputError, match=r"fully connected layer to quantize\. Pass a network with such layers\."):
        PTQ().attach(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), AttachContext(data=[images()]))


def test_an_already_quantized_network_raises():
    graph = calibrated().model
    with pytest.raises(InputError, match="already quantized"):
        PTQ().attach(graph, AttachContext(data=[images()]))
    model = Small()
    PTQ().attach(model, AttachContext(data=[images()]))
    with pytest.raises(InputError, match="already quantized"):  # the layers are shared with the graph
        PTQ().attach(model, AttachContext(data=[images()]))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"left": images(), "right": images()}, "of type dict.* It has the keys 'left', 'right'; exactly one"),
        ("images", "a batch of the data is of type str"),
        (images()[0], r"a tensor of shape \(3, 8, 8\)"),
        ([], "a batch of the data is of type list"),
        ((torch.zeros(4), images()), r"a tensor of shape \(4,\)"),
        (images().numpy(), "a batch of the data is of type ndarray"),
        (images().to(torch.uint8), r"torch\.uint8.*floating-point"),
    ],
    ids=["dict", "text", "one image", "empty list", "labels first", "numpy", "pixels"],
)
def test_batches_without_images_raise(batch, message):
    with pytest.raises(InputError, match=message):
        calibrated(data=[batch])


def test_nonfinite_images_and_activations_raise():
    broken = images()
    broken[3, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="hold NaN"):
        calibrated(data=[broken])
    model = Small().eval()
    model.bn1.bias.data[0] = 1e38
    model.conv2.weight.data *= 1e38
    with pytest.raises(InputError, match="not finite at"):
        calibrated(model, PTQ(activation_range="mse"))


@pytest.mark.parametrize("name", ["conv1.weight", "linear.bias", "bn2.running_var"])
def test_nonfinite_weights_raise(name):
    model = Small().eval()
    model.state_dict()[name].view(-1)[1] = torch.nan if name == "linear.bias" else torch.inf
    with pytest.raises(InputError, match=f"^{name} has values that are not finite"):
        calibrated(model)


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 0},
        {"bits": 1},
        {"bits": 9},
        {"activation_bits": 16},
        {"percentile": 50},
        {"percentile": 101},
        {"calibration_images": 0},
        {"weight_range": "entropy"},
        {"max_drop": -1},
        {"first_last_bits": 9},
        {"per_channel": "row"},
        {"activation_range": "max"},
        {"exclude": "conv1"},
        {"bit": 8},
    ],
    ids=lambda values: "-".join(f"{key}={value}" for key, value in values.items()),
)
def test_invalid_options_raise(values):
    with pytest.raises(InputError):
        PTQ(**values)


def test_a_resnet_with_20_layers_is_quantized():
    torch.manual_seed(0)
    model = build("resnet20", 10).eval()
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        graph = calibrated(model, data=[x]).model
        assert (graph(x) - before).abs().mean() < 0.1 * before.std()
    assert sum(parametrize.is_parametrized(module) for module in graph.modules()) == 20
