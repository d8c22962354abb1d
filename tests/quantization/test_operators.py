"""Multiplication counts compared with slow counts: nonzero entries of a bilinear form, or loops."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jacobian
from torchvision.ops import deform_conv2d

from tersor.graph.multiplications import FORMULAS
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.operators import run_through


class Computes(nn.Module):
    """A network of one function."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(parameters)

    def forward(self, images):
        return self.function(images, *self.weights)


def counted(network, images):
    return sum(product.macs for product in run_through(network, images).products)


def uncounted(network, images):
    return run_through(network, images).uncounted


def entries(function, images):
    """The number of input-output pairs with a nonzero coefficient in a linear function: one multiplication each."""
    return int(jacobian(lambda x: function(x) - function(torch.zeros_like(x)), images, vectorize=True).count_nonzero())


def terms(function, first, second):
    """The number of terms x_i y_j in all outputs of a bilinear function."""
    found = jacobian(lambda x: jacobian(lambda y: function(x, y), second, create_graph=True), first)
    return int(found.count_nonzero())


torch.manual_seed(0)
LINEAR = {
    "Conv1d": (nn.Conv1d(4, 6, 3, stride=2, groups=2), (1, 4, 9)),
    "Conv2d dilated": (nn.Conv2d(4, 4, 2, dilation=2, groups=4), (1, 4, 5, 5)),
    "Conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (1, 4, 5)),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 2, 3, stride=2), (1, 3, 3, 3)),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 2, 2, stride=3), (1, 2, 2, 2, 2)),
    "Linear of tokens": (nn.Linear(5, 3), (1, 4, 5)),
    "F.conv2d": (Computes(F.conv2d, torch.randn(3, 2, 2, 2)), (1, 2, 4, 4)),
    "F.conv_transpose2d": (Computes(F.conv_transpose2d, torch.randn(2, 3, 2, 2)), (1, 2, 4, 4)),
    "F.linear": (Computes(F.linear, torch.randn(3, 5)), (1, 5)),
    "matmul with a vector": (Computes(torch.matmul, torch.randn(5)), (1, 4, 5)),
    "mv": (Computes(lambda x, w: torch.mv(w, x[0]), torch.randn(3, 5)), (1, 5)),
    "addmv": (Computes(lambda x, w, b: torch.addmv(b, w, x[0]), torch.randn(3, 5), torch.randn(3)), (1, 5)),
    "dot": (Computes(lambda x, w: torch.dot(x[0], w), torch.randn(5)), (1, 5)),
    "vdot": (Computes(lambda x, w: torch.vdot(x[0], w), torch.randn(5)), (1, 5)),
    "einsum": (Computes(lambda x, w: torch.einsum("bchw,cok->bohwk", x, w), torch.randn(3, 4, 2)), (1, 3, 2, 2)),
    "tensordot": (Computes(lambda x, w: torch.tensordot(x, w, 2), torch.randn(3, 4, 2)), (2, 3, 4)),
    "baddbmm": (Computes(lambda x, w: torch.baddbmm(torch.ones(5).double(), x, w), torch.randn(2, 4, 5)), (2, 3, 4)),
    "addbmm": (Computes(lambda x, w, b: torch.addbmm(b, x, w), torch.randn(2, 4, 5), torch.randn(3, 5)), (2, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_multiplications_of_linear_operators(name):
    network, shape = LINEAR[name]
    network, images = network.double(), torch.randn(shape, dtype=torch.float64)
    assert counted(network, images) == entries(network, images)


BILINEAR = {
    "einsum of two": lambda x, y: torch.einsum("bij,bkj->bik", x, y),
    "einsum with a sum": lambda x, y: torch.einsum("bij,bkj->ik", x, y),
    "matmul": lambda x, y: x @ y.mT,
    "matmul that is broadcast": lambda x, y: x @ y[0].mT,
    "bmm": lambda x, y: torch.bmm(x, y.mT),
    "inner": lambda x, y: torch.inner(x[0], y[0]),
}


@pytest.mark.parametrize("name", BILINEAR)
def test_multiplications_of_products_of_two_activations(name):
    function = BILINEAR[name]
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.float64)
    network = Computes(lambda both: function(both[:, :3], both[:, 3:]))
    assert counted(network, torch.cat([x, y], 1)) == terms(function, x, y)


@pytest.mark.parametrize("bias", [True, False])
def test_multiplications_of_bilinear_layers(bias):
    layer, rows = nn.Bilinear(5, 4, 3, bias=bias), torch.randn(2, 5)
    network = Computes(lambda x: layer(x, x[:, :4]))
    network.layer = layer
    weight_times_first = 2 * 3 * 5 * 4
    that_times_second = 2 * 3 * 4
    assert counted(network, rows) == weight_times_first + that_times_second


def recurrent(kind, steps, inputs, hidden, layers, directions, projected):
    """Loops over layers, directions, steps and gates."""
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    given = projected or hidden
    macs = 0
    for layer, _direction, _step in itertools.product(range(layers), range(directions), range(steps)):
        entering = inputs if layer == 0 else given * directions
        macs += gates * (hidden * entering + hidden * given) + (projected * hidden)
    return macs


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "layers", "directions", "projected"),
    [(nn.LSTM, 1, 1, 0), (nn.LSTM, 2, 2, 0), (nn.LSTM, 2, 2, 3), (nn.GRU, 2, 2, 0), (nn.RNN, 1, 2, 0)],
)
def test_multiplications_of_recurrent_layers(kind, layers, directions, projected, batch_first):
    options = {"proj_size": projected} if projected else {}
    network = kind(6, 5, layers, bidirectional=directions == 2, batch_first=batch_first, **options)
    images = torch.randn(1, 7, 6) if batch_first else torch.randn(7, 1, 6)
    assert counted(network, images) == recurrent(kind, 7, 6, 5, layers, directions, projected)
    assert {product.module for product in run_through(nn.Sequential(network), images).products} == {"0"}
    with torch.inference_mode():
        assert counted(network, images) == recurrent(kind, 7, 6, 5, layers, directions, projected)


def test_multiplications_of_recurrent_layers_of_cudnn():
    weights = [torch.empty(20, 6), torch.empty(20, 5), torch.empty(20), torch.empty(20)] * 2
    doubled = FORMULAS[torch.ops.aten._cudnn_rnn](torch.empty(7, 3, 6), weights, 4, None, out_val=None)
    assert doubled == 2 * 3 * recurrent(nn.LSTM, 7, 6, 5, 1, 2, 0)


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_multiplications_of_recurrent_cells(cell, gates):
    assert counted(cell(6, 5), torch.randn(1, 6)) == gates * 5 * (6 + 5)


def attention(queries, keys, width, *, projected=True):
    """Multiplications of the projections of each token, and of the scores and sums of each pair."""
    tokens = width * width * (2 * queries + 2 * keys) if projected else 0
    return tokens + sum(2 * width for _ in range(queries) for _ in range(keys))


@pytest.mark.parametrize("need_weights", [True, False])
def test_multiplications_of_attention_with_and_without_fusion(need_weights):
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    network = Computes(lambda x: layer(x, x, x, need_weights=need_weights)[0])
    network.layer = layer
    assert counted(network, torch.randn(1, 5, 8)) == attention(5, 5, 8)
    fused = Computes(lambda x: F.scaled_dot_product_attention(x[:, :2], x, x))
    assert counted(fused, torch.randn(1, 5, 8)) == attention(2, 5, 8, projected=False)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert counted(encoder, torch.randn(1, 5, 8)) == attention(5, 5, 8) + 2 * 5 * 8 * 16


@torch.library.custom_op("tersor_tests::scaled", mutates_args=())
def scaled(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values * weight


@torch.library.custom_op("tersor_tests::scale_", mutates_args=("values",))
def scale_(values: torch.Tensor) -> None:
    values.mul_(2)


def scaled_in_place(images):
    values = images.clone()
    torch.ops.tersor_tests.scale_(values)
    return values


@pytest.mark.parametrize(
    ("function", "shape", "operator"),
    [
        (torch.fft.rfft2, (1, 3, 4, 4), "aten._fft_r2c"),
        (
            lambda x: F.grid_sample(x, torch.zeros(1, 2, 2, 2), align_corners=False),
            (1, 3, 4, 4),
            "aten.grid_sampler_2d",
        ),
        (lambda x: torch.cdist(x, x), (1, 3, 4), "aten._cdist_forward"),
        (lambda x: torch.linalg.inv(x + 9 * torch.eye(3)), (1, 3, 3), "aten.linalg_inv_ex"),
        (
            lambda x: deform_conv2d(x, torch.zeros(1, 18, 3, 3), torch.randn(4, 2, 3, 3)),
            (1, 2, 5, 5),
            "torchvision.deform_conv2d",
        ),
        (lambda x: torch.ops.tersor_tests.scaled(x, torch.ones(4)), (1, 4), "tersor_tests.scaled"),
        (scaled_in_place, (1, 4), "tersor_tests.scale_"),
    ],
)
def test_uncounted_operators_that_multiply_are_named_with_their_module(function, shape, operator):
    network = nn.Sequential(nn.Identity(), Computes(function))
    assert uncounted(network, torch.randn(shape)) == (f"{operator} in 1",)


class Harmless(nn.Module):
    """Parameters in operators that multiply elementwise, normalize, look up or move values."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
        self.layer_norm, self.rms_norm, self.prelu = nn.LayerNorm(4), nn.RMSNorm(4), nn.PReLU(4)
        self.token, self.scale = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.ones(4))
        self.positions, self.bag = nn.Embedding(17, 4), nn.EmbeddingBag(9, 4)
        self.table, self.normed = (
            nn.Parameter(torch.zeros(4, 17)),
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        )

    def forward(self, images):
        for norm in self.norms:
            images = self.prelu(norm(images))
        images = F.interpolate(F.max_pool2d(F.avg_pool2d(images, 2), 2), scale_factor=2, mode="bilinear")
        tokens = images.flatten(2).mT
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) * self.scale
        tokens = self.rms_norm(self.layer_norm(tokens)) + self.positions(torch.arange(tokens.shape[1]))
        tokens = torch.where(tokens > 0, tokens, self.scale) + self.table[:, torch.arange(tokens.shape[1])].mT
        tokens = tokens + self.bag(torch.tensor([[1, 2]])) + torch.stack([self.scale, self.scale]).sum(0)
        tokens = torch.lerp(tokens.softmax(-1), tokens.roll(1, 1), self.scale).cumsum(1)
        return self.normed(F.normalize(tokens, dim=-1)).std(1)


def test_elementwise_operators_are_neither_counted_nor_reported():
    ran = run_through(Harmless(), torch.randn(1, 4, 8, 8))
    assert ran.uncounted == ()
    assert {product.module for product in ran.products} == {"normed"}


def test_counting_does_not_change_the_network():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run_through(network, torch.randn(1, 3, 5, 5))
    assert network[1].training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with pytest.raises(RuntimeError):
        run_through(network, torch.randn(1, 2, 5, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class WritesBehindQuantizer(nn.Module):
    """A convolution of quantized images, with or without an in-place write to a channel."""

    def __init__(self, *, writes):
        super().__init__()
        self.quantizer, self.layer, self.writes = FakeQuantize(Grid.unsigned(8)), nn.Conv2d(3, 4, 1), writes

    def forward(self, images):
        rounded = self.quantizer(images.clone())
        if self.writes:
            rounded[:, 0].mul_(0.3)
        return self.layer(rounded)


@pytest.mark.parametrize("writes", [False, True])
def test_a_value_changed_in_place_after_quantization_counts_as_float(writes):
    network = WritesBehindQuantizer(writes=writes)
    (product,) = run_through(network, torch.rand(1, 3, 4, 4), planned=True).products
    assert product.operands[0].bits == (None if writes else 8)
