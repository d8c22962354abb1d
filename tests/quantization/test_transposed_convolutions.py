"""Transposed convolutions are written as convolutions with the same outputs, and computed in integers."""

import onnx
import pytest
import torch
from torch import fx, nn

import tersor
from tersor.core.target import Target
from tersor.evaluation.session import open_session
from tersor.graph.aten import shape_of
from tersor.graph.capture import capture
from tersor.graph.feature_extraction import FeatureExtractor
from tersor.methods.lsq import LSQ
from tersor.methods.ptq import PTQ
from tersor.methods.qat import QAT
from tersor.quantization.transposed_convolutions import transposed_convolutions, write_as_convolutions
from tersor.training.context import AttachContext

SETTINGS = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1},
    {"kernel_size": 5, "stride": 3},
    {"kernel_size": 7, "stride": 3, "padding": 4},
    {"kernel_size": 6, "stride": 2, "padding": 4},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2},
    {"kernel_size": (2, 4), "stride": (1, 2), "padding": (0, 1)},
    {"kernel_size": (3, 2), "stride": (3, 2)},
]


class Decoder(nn.Module):
    """A convolution, a transposed one that is called twice, and a head."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, 1, 1)
        self.up = nn.ConvTranspose2d(6, 6, **(settings or {"kernel_size": 3, "stride": 2, "padding": 1}))
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, images):
        values = self.up(self.first(images).relu())
        return self.head(self.norm(self.up(values)).relu())


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Values(fx.Interpreter):
    """Checks the recorded shape of every tensor."""

    def run_node(self, n):
        value = super().run_node(n)
        if n.op.startswith("call"):
            assert value.shape[1:] == torch.Size(shape_of(n)[1:]), n
        return value


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_outputs_and_the_recorded_shapes_are_right(settings):
    network = Decoder(**settings).double().eval()
    images = IMAGES.double()
    expected = network(images)
    graph = capture(network, images)
    assert list(transposed_convolutions(graph)) == ["up"]
    write_as_convolutions(graph, ["up"])
    assert type(graph.get_submodule("up")) is nn.Conv2d
    torch.testing.assert_close(graph(images), expected)
    for size in (1, 3):
        torch.testing.assert_close(Values(graph).run(images[:size]), expected[:size])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.ConvTranspose1d(4, 5, 3, 2, 1), (2, 4, 7)), (nn.ConvTranspose3d(4, 5, 4, 2, 1), (2, 4, 3, 4, 5))],
)
def test_sequences_and_videos(layer, shape):
    network = nn.Sequential(layer, nn.ReLU()).double().eval()
    values = torch.randn(shape, dtype=torch.float64)
    graph = capture(network, values)
    write_as_convolutions(graph, ["0"])
    torch.testing.assert_close(Values(graph).run(values), network(values))


class Shared(nn.Module):
    """A decoder that uses the weight of its encoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)
        self.decoder.weight = self.encoder.weight

    def forward(self, images):
        return self.decoder(self.encoder(images))


@pytest.mark.parametrize(
    "network",
    [
        nn.ConvTranspose2d(3, 6, 2, 2, groups=3),
        nn.ConvTranspose2d(3, 6, 3, 2, dilation=2),
        nn.ConvTranspose2d(3, 6, 1, 2),  # four times the multiplications
        Shared(),
    ],
    ids=["grouped", "dilated", "sparse", "shared weight"],
)
def test_other_layers_stay_as_they_are(network):
    network = network if isinstance(network, Shared) else nn.Sequential(network, nn.ReLU())
    assert not transposed_convolutions(capture(network.eval(), IMAGES))


def test_its_output_can_still_be_compared_in_distillation():
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 6, 3, 2, 1), nn.ReLU()).eval()
    expected = network[:2](IMAGES)
    attached = PTQ().attach(network, AttachContext(data=[IMAGES]))
    _, outputs = FeatureExtractor(attached.model, ["1"])(IMAGES)
    torch.testing.assert_close(outputs["1"], expected)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_it_is_computed_in_integers(tmp_path, runtime):
    network = Decoder().eval()
    with torch.no_grad():
        network.norm.running_mean.normal_()
        network.norm.running_var.uniform_(0.5, 2)
    quantized = tersor.quantize(network, [IMAGES], runtime=runtime)
    assert tersor.integer_coverage(quantized, IMAGES).share == 1
    file = tersor.export(quantized, IMAGES, tmp_path / "a.onnx")
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert "ConvTranspose" not in kinds
    with torch.no_grad():
        expected = quantized(IMAGES)
        error = (expected - network(IMAGES)).norm() / network(IMAGES).norm()
    assert error < 0.05
    outputs = torch.from_numpy(open_session(file, runtime, precision="float32").run(IMAGES.numpy()))
    assert (outputs - expected).norm() / expected.norm() < 0.03


def test_a_note_names_it():
    attached = PTQ().attach(Decoder().eval(), AttachContext(data=[IMAGES]))
    assert "transposed convolutions written as convolutions, for integer kernels: up" in attached.notes


def test_an_excluded_one_stays_as_it_is(tmp_path):
    quantized = tersor.quantize(Decoder().eval(), [IMAGES], exclude=["up"])
    assert type(quantized.get_submodule("up")) is nn.ConvTranspose2d
    (left,) = {each.name for each in tersor.integer_coverage(quantized, IMAGES).operators}
    assert left == "up"
    tersor.save(quantized, tmp_path / "a")
    loaded = tersor.load(Decoder(), tmp_path / "a")
    torch.testing.assert_close(loaded(IMAGES), quantized(IMAGES))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_saved_network_is_loaded(tmp_path, runtime):
    quantized = tersor.quantize(Decoder().eval(), [IMAGES], runtime=runtime)
    tersor.save(quantized, tmp_path / "a")
    loaded = tersor.load(Decoder(), tmp_path / "a")
    torch.testing.assert_close(loaded(IMAGES), quantized(IMAGES), rtol=0, atol=0)
    assert list(loaded.state_dict()) == list(quantized.state_dict())


@pytest.mark.parametrize("method", [QAT(), LSQ()], ids=["qat", "lsq"])
def test_it_is_trained(method):
    context = AttachContext(data=[IMAGES], steps=2, steps_per_epoch=1, target=Target())
    attached = method.attach(Decoder(), context)
    attached.begin()
    layer = attached.model.get_submodule("up")
    attached.model(IMAGES).square().mean().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert gradient.shape == (24, 6, 2, 2)
    assert gradient.abs().sum() > 0
