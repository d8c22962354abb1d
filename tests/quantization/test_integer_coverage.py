"""Operators that stay in float are listed, with reason and share."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersor
from tersor.core.errors import CompressionWarning
from tersor.methods.adaround import AdaRound
from tersor.methods.lsq import LSQ
from tersor.methods.mixed_precision import MixedPrecision
from tersor.methods.ptq import PTQ
from tersor.methods.qat import QAT
from tersor.quantization.integer_coverage import integer_coverage
from tersor.training.context import AttachContext

IMAGES = torch.rand(4, 3, 8, 8)


class SameConv(nn.Conv2d):
    """Pads its input as TensorFlow does."""

    def forward(self, images):
        return F.conv2d(F.pad(images, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """Changes its weight in `_conv_forward`."""

    def _conv_forward(self, images, weight, bias):
        return super()._conv_forward(images, weight / weight.std(), bias)


class Pool(nn.Module):
    """CLIP's attention pool: a function uses the weights of its layers."""

    def __init__(self):
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(64, 1, 8))
        self.q, self.k, self.v, self.c = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = x.flatten(2).permute(2, 0, 1) + self.pos
        weights = {"q_proj_weight": self.q.weight, "k_proj_weight": self.k.weight, "v_proj_weight": self.v.weight}
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        ends = None, None, False, 0, self.c.weight, self.c.bias
        options = {"use_separate_proj_weight": True, "training": self.training, "need_weights": False}
        return F.multi_head_attention_forward(x[:1], x, x, 8, 2, None, biases, *ends, **options, **weights)[0].squeeze(
            0
        )


class Tokens(nn.Module):
    """A layer over the positions of a feature map (N, 64, 8). The first of several outputs is used."""

    def __init__(self, layer, *, several=False):
        super().__init__()
        self.layer, self.several = layer, several

    def forward(self, images):
        found = self.layer(images.flatten(2).mT)
        return (found[0] if self.several else found).mT.unflatten(2, (8, 8))


class Itself(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens):
        return self.attention(tokens, tokens, tokens)


class Multiplies(nn.Module):
    """A function of an activation and its own tensor."""

    def __init__(self, function, tensor, *, learns=True):
        super().__init__()
        self.function = function
        self.inner = nn.Identity()  # so that it is traced through
        if learns:
            self.weight = nn.Parameter(tensor)
        else:
            self.register_buffer("weight", tensor)

    def forward(self, images):
        return self.function(self.inner(images), self.weight)


class Applied(nn.Module):
    """A function of a layer and the images."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, images):
        return self.function(self.layer, images)


class Images(nn.Module):
    """Any values as images (N, 3, 8, 8)."""

    def forward(self, values):
        return values.flatten(1)[:, :64].reshape(-1, 1, 8, 8).expand(-1, 3, 8, 8)


class Twice(nn.Module):
    """Two inputs of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens):
        return self.layer(tokens, tokens)


def around(middle):
    torch.manual_seed(0)
    ends = nn.Conv2d(3, 8, 1), nn.ReLU(), middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*ends).eval()


def planned(network, **options):
    """The coverage of a network whose quantizers are not calibrated."""
    return integer_coverage(PTQ(**options).attach(network, AttachContext(data=[IMAGES])).model, IMAGES, planned=True)


ENDS = 3 * 8 * 64 + 8 * 10
TRANSPOSED = "tersor does not quantize ConvTranspose2d"
ATTENTION = "product of two activations, as in attention, which would not be faster in integers"
IN_FLOAT = {
    "matrix product with a parameter": (
        Multiplies(lambda x, w: x @ w, torch.randn(8, 8)),
        {"2.weight": (8 * 8 * 8 * 8, "computed by a function (matmul), not by a layer")},
    ),
    "product with a constant": (
        Multiplies(torch.matmul, torch.randn(8, 8), learns=False),
        {"2": (8 * 8 * 8 * 8, "multiplication by a constant")},
    ),
    "einsum of grids": (
        Multiplies(lambda x, _: torch.einsum("bchw,bdhw->bcd", x, x)[..., None], torch.zeros(1)),
        {"2": (8 * 8 * 8 * 8, "there is no integer operator for einsum")},
    ),
    "product of activations": (
        Multiplies(lambda x, _: x.sin() @ x.cos(), torch.zeros(1)),
        {"2": (8 * 8 * 8 * 8, ATTENTION)},
    ),
    "transposed convolution": (
        nn.ConvTranspose2d(8, 8, 1),
        {"2": (64 * 64, TRANSPOSED)},
    ),
    "Bilinear": (Tokens(Twice(nn.Bilinear(8, 8, 8))), {"2.layer.layer": (64 * 576, "Bilinear is not supported")}),
    "LSTM": (
        Tokens(nn.LSTM(8, 8, batch_first=True), several=True),
        {"2.layer": (64 * 4 * 128, "recurrent layers are not supported")},
    ),
    "GRU": (
        Tokens(nn.GRU(8, 8, batch_first=True), several=True),
        {"2.layer": (64 * 3 * 128, "recurrent layers are not supported")},
    ),
    "MultiheadAttention": (
        Tokens(Itself(), several=True),
        {"2.layer.attention": (2 * 64 * 64 * 8, ATTENTION)},
    ),
    "attention pool": (Pool(), {"2": (2 * 64 * 8, ATTENTION)}),
    "the attention of a Transformer": (
        Tokens(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        {"2.layer.self_attn": (2 * 64 * 64 * 8, ATTENTION)},
    ),
}

INTEGERS = {
    "MultiheadAttention": 4 * 64 * 64,
    "attention pool": 2 * 64 + 2 * 64 * 64,
    "the attention of a Transformer": 4 * 64 * 64 + 2 * 64 * 8 * 16,
}
"""The MACs of the projections around attention, and of a Transformer's other layers."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "GRU" else ()) for kind in IN_FLOAT]
)
def test_operators_in_float_are_listed_with_reason_and_share(kind):
    middle, expected = copy.deepcopy(IN_FLOAT[kind])
    if kind == "attention pool":
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), middle, nn.Linear(8, 10)).eval()
    else:
        network = around(middle)
    covered = planned(network)
    found = {(each.name, each.macs, each.reason) for each in covered.operators}
    assert found == {(name, macs, reason) for name, (macs, reason) in expected.items()}
    in_float, integers = sum(macs for macs, _ in expected.values()), ENDS + INTEGERS.get(kind, 0)
    assert covered.macs == in_float + integers
    assert covered.share == pytest.approx(integers / covered.macs)
    assert sum(each.share for each in covered.operators) == pytest.approx(1 - covered.share)
    assert [each.macs for each in covered.operators] == sorted((each.macs for each in covered.operators), reverse=True)
    assert covered.warning is not None
    assert covered.warning.startswith("only ")


@pytest.mark.parametrize(
    "middle",
    [
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Sequential(nn.Dropout(), nn.Conv2d(8, 8, 3, padding="same", groups=4)),
        nn.Sequential(*[nn.Conv2d(8, 8, 1)] * 2),
        Tokens(nn.Linear(8, 8)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3, padding=1), nn.Unflatten(2, (8, 8))),
        nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Conv3d(4, 4, 3, padding=1), nn.Flatten(1, 2)),
        SameConv(8, 8, 3),
        Standardized(8, 8, 1),
        Multiplies(lambda x, w: F.conv2d(x, w, padding=1), torch.randn(8, 8, 3, 3)),
    ],
)
def test_a_quantized_layer_is_computed_in_integers(middle):
    covered = planned(around(copy.deepcopy(middle)))
    assert (covered.share, covered.operators, covered.warning, covered.notes) == (1.0, (), None, ())


def test_layers_in_float_because_of_exclude_or_max_drop_are_listed():
    network = around(nn.Conv2d(8, 8, 3, padding=1))
    (left,) = planned(copy.deepcopy(network), exclude=("2",)).operators
    assert (left.name, left.kind, left.reason) == ("2", "Conv2d", "excluded")
    attached = PTQ().attach(network, AttachContext(data=[IMAGES]))
    before = {each.reason for each in integer_coverage(attached.model, IMAGES).operators}
    assert before == {"the quantizers are not calibrated yet"}
    attached.begin()
    for quantizer in (attached.quantizers.of_weight("2"), attached.quantizers.of_activation("quantizers._1")):
        quantizer.enabled = False
    left = {each.name: each.reason for each in integer_coverage(attached.model, IMAGES).operators}
    returns_float = {"0": "ONNX Runtime has no integer convolution that returns float values"}
    assert left == returns_float | {"2": "rounding would cost too much accuracy"}
    attached.quantizers.of_weight("2").enabled = True
    left = {each.name: each.reason for each in integer_coverage(attached.model, IMAGES).operators}
    assert left == returns_float | {"2": "input in float"}


def test_a_network_that_is_not_quantized_is_computed_in_float():
    covered = integer_coverage(around(nn.Conv2d(8, 8, 3)), IMAGES)
    assert covered.share == 0
    assert {each.reason for each in covered.operators} == {"the network is not quantized"}
    assert integer_coverage(nn.Flatten(), IMAGES).share == 1


def test_uncounted_operators_are_noted():
    covered = planned(around(Multiplies(lambda x, _: torch.fft.irfft2(torch.fft.rfft2(x)), torch.zeros(1))))
    assert covered.share == 1
    (line,) = covered.notes
    left = "these operators are computed in float and are not included in the MACs"
    assert line == f"{left}: aten._fft_r2c in 2, aten._fft_c2r in 2"
    assert covered.warning == covered.notes[0], "nobody knows that it is next to nothing"


@pytest.mark.parametrize(
    "method",
    [
        PTQ(),
        PTQ(activation_range="mse", calibration_images=4),
        QAT(),
        LSQ(),
        MixedPrecision(average_bits=4, widths=(4,)),
        AdaRound(iterations=1),
    ],
)
def test_every_method_adds_the_notes_in_begin(method):
    network = around(nn.ConvTranspose2d(8, 8, 3, padding=1))
    attached = method.attach(network, AttachContext(data=[IMAGES], steps=4))
    attached.begin()
    found = [note for note in attached.notes if "float" in note or "integers" in note]
    assert found == [
        "4.2 % of the MACs are computed in integers",
        f"in float (reason: {TRANSPOSED}): 2 (95.8 % of the MACs)",
    ]


def test_data_that_can_be_read_only_once_is_enough():
    attached = PTQ().attach(around(nn.ConvTranspose2d(8, 8, 3, padding=1)), AttachContext(data=iter([IMAGES])))
    attached.begin()
    assert any("ConvTranspose2d" in note for note in attached.notes)


def test_many_operators_with_the_same_reason_are_one_note():
    covered = planned(around(nn.Sequential(*(nn.ConvTranspose2d(8, 8, 3, padding=1) for _ in range(12)))))
    assert len(covered.operators) == 12
    (_, line) = covered.notes
    assert line.count("% of the MACs") == 8
    assert "and 4 more (33.2 %)" in line


def test_quantize_warns_below_95_percent_in_integers():
    network = around(nn.ConvTranspose2d(8, 8, 3, padding=1))
    with pytest.warns(
        CompressionWarning, match=r"only 4\.2 % of.*tersor does not quantize ConvTranspose2d.*\(95\.8 %\)"
    ):
        quantized = tersor.quantize(network, [IMAGES])
    assert [each.name for each in tersor.integer_coverage(quantized, IMAGES).operators] == ["2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tersor.quantize(around(nn.Conv2d(8, 8, 3)), [IMAGES])


def test_copies_and_loaded_networks_have_the_same_list(tmp_path):
    network = around(nn.ConvTranspose2d(8, 8, 3, padding=1))
    with pytest.warns(CompressionWarning):
        quantized = tersor.quantize(network, [IMAGES])
    expected = tersor.integer_coverage(quantized, IMAGES)
    again = tersor.load(around(nn.ConvTranspose2d(8, 8, 3, padding=1)), tersor.save(quantized, tmp_path / "saved"))
    for other in (copy.deepcopy(quantized), again):
        assert tersor.integer_coverage(other, IMAGES) == expected
    inside = tersor.integer_coverage(nn.Sequential(nn.Identity(), quantized), IMAGES)
    assert [(each.name, each.reason) for each in inside.operators] == [("1.2", TRANSPOSED)]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (nn.Conv2d(3, 3, 1), "outside of the part of the network that was quantized"),
        (SameConv(3, 3, 3), "SameConv is a subclass with its own forward method"),
        (nn.ConvTranspose2d(3, 3, 1), TRANSPOSED),
        (
            Applied(nn.GRU(8, 8, batch_first=True), lambda layer, x: layer(x[:, 0])[0]),
            "recurrent layers are not supported",
        ),
        (Applied(nn.Bilinear(8, 8, 8), lambda layer, x: layer(x, x)), "Bilinear is not supported"),
        (
            Applied(nn.Linear(8, 8), lambda layer, x: x @ layer.weight),
            "the forward method of Applied reads the weights directly",
        ),
    ],
)
def test_modules_outside_the_captured_network_are_listed_with_their_reason(first, reason):
    around_it = nn.Sequential(copy.deepcopy(first), nn.Identity(), nn.ReLU())
    quantized = PTQ().attach(around(nn.Conv2d(8, 8, 1)), AttachContext(data=[IMAGES])).model
    covered = integer_coverage(nn.Sequential(around_it, Images(), quantized), IMAGES, planned=True)
    assert [each.reason for each in covered.operators] == [reason]
    assert covered.operators[0].name.startswith("0.0")


def test_a_layer_with_hooks_in_a_captured_network_is_listed():
    network = PTQ(exclude=("2",)).attach(around(nn.Conv2d(8, 8, 1)), AttachContext(data=[IMAGES])).model
    network.get_submodule("2").register_forward_hook(lambda _module, _inputs, output: output)
    (left,) = integer_coverage(network, IMAGES, planned=True).operators
    assert (left.name, left.reason) == ("2", "registered forward hooks")
