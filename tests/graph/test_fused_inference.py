"""A fused teacher computes the same outputs as the network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tersor.graph.aten import operator_name
from tersor.graph.feature_extraction import FeatureExtractor
from tersor.graph.fused_inference import FusedConvolution, fused, rewritten
from tersor.models import build
from toy_networks import short

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bfloat16 convolutions for this processor, and the network stays as it is",
)


def settled(model):
    """Give BatchNorms statistics, scales and shifts that differ from the initial ones."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.weight, -1.0, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                values.data.uniform_(low, high, generator=draw)
    return model.eval()


def images(count=4, pixels=32, seed=1):
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed))


def passes(model):
    return sum(isinstance(module, FusedConvolution) for module in model.modules())


def test_every_convolution_of_a_resnet_is_one_fused_pass_and_its_layers_can_be_read():
    model = settled(short("resnet8"))
    before = copy.deepcopy(model.state_dict())
    paths = ("layer1", "layer2", "layer3")
    faster = fused(model, images(), paths)
    assert isinstance(faster, fx.GraphModule)
    assert passes(faster) == 7
    called = [node.op for node in faster.graph.nodes if node.op == "call_module"]
    assert len(called) == 7 + 1, "BatchNorm is no pass of its own any more"
    for ours, theirs in zip(
        FeatureExtractor(faster, paths)(images(seed=2)), FeatureExtractor(model, paths)(images(seed=2)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_requested_layer_ends_a_fused_pass():
    model = settled(short("resnet8"))
    path = "layer1.0.bn1"
    faster = fused(model, images(), (path,))
    assert passes(faster) == 7, "it is no reason to ask the network itself"
    (_, ours), (_, theirs) = (FeatureExtractor(each, (path,))(images(seed=2)) for each in (faster, model))
    assert ours[path].min() < 0, "it lies before the ReLU"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "googlenet", "vit_b_16")
        ),
    ],
)
def test_fused_torchvision_networks_compute_the_same_outputs(name):
    require_fused(lambda: build(name, 10), 224 if name == "vit_b_16" else 64)


@pytest.mark.parametrize("name", ["mobilenet2", "densenet", "shufflenet"])
def test_fused_short_networks_compute_the_same_outputs(name):
    require_fused(lambda: short(name), 64)


def require_fused(make, size):
    torch.manual_seed(0)
    model = settled(make())
    faster = fused(model, images(2, size))
    ours, theirs = faster(images(2, size, seed=2)), model(images(2, size, seed=2))
    assert float((ours - theirs).detach().abs().max()) <= 1e-3 * float(theirs.detach().abs().max())
    assert passes(faster) == sum(type(module) is nn.Conv2d for module in model.modules())


class Sums(nn.Module):
    """Two convolutions of the same images, a combination of their outputs, and a ReLU."""

    def __init__(self, add):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.add = add

    def forward(self, x):
        return F.relu(self.add(self.one(x), self.two(x))).mean((2, 3))


def in_place(a, b):
    b += a
    return b


def left(model):
    """The operators that are not a fused pass, an input or an output."""
    return [operator_name(node) for node in model.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("add", "expected"),
    [
        (lambda a, b: a + b, ["mean"]),
        (torch.add, ["mean"]),
        (in_place, ["mean"]),
        (lambda a, b: torch.add(a, b, alpha=3), ["add", "relu", "mean"]),
        (lambda a, b: a + a + b, ["add", "mean"]),
        (lambda a, b: a + 1.0 + b, ["add", "mean"]),
        (lambda a, b: torch.cat([a, b + a], 1), ["cat", "relu", "mean"]),
        (lambda a, b: a - b, ["sub", "relu", "mean"]),
    ],
)
def test_an_addition_is_fused_if_it_is_the_only_user_of_the_convolution(add, expected):
    torch.manual_seed(0)
    model = Sums(add).eval()
    found = rewritten(model, images(), ())
    assert left(found) == expected
    torch.testing.assert_close(found(images(seed=2)), model(images(seed=2)), rtol=1e-5, atol=1e-5)
    assert isinstance(fused(model, images()), fx.GraphModule)


class Named(nn.Module):
    """Its submodules are named like functions."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU6()

    def forward(self, x):
        return self.relu(self.conv(x)).mean((2, 3))


def test_a_submodule_named_relu_that_is_not_a_relu_is_not_fused():
    model = Named().eval()
    torch.testing.assert_close(fused(model, images())(100 * images()), model(100 * images()), rtol=1e-5, atol=1e-5)


def test_other_devices_use_torch_operators(monkeypatch):
    model = settled(short("resnet8"))
    faster = rewritten(model, images(), ())
    monkeypatch.setattr("tersor.graph.fused_inference._ON", "elsewhere")
    torch.testing.assert_close(faster(images(seed=2)), model(images(seed=2)), rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) if x.sum() > 0 else self.conv(x).amax((2, 3))


class ChecksSize(nn.Module):
    """Checks the size of its input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) * {32: 1.0}[x.shape[-1]]


class Apart(nn.Module):
    """Turns autocast off for its head, which a graph does not preserve."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


def test_a_network_that_cannot_be_captured_is_returned_unchanged():
    model = Branching().eval()
    assert fused(model, images()) is model


def test_a_network_that_checks_its_input_size_is_fused():
    model = ChecksSize().eval()
    found = fused(model, images())
    assert passes(found) == 1
    torch.testing.assert_close(found(images(seed=2)), model(images(seed=2)), rtol=1e-5, atol=1e-5)


def test_a_network_that_turns_autocast_off_is_not_fused_for_bfloat16():
    model = Apart().eval()
    assert fused(model, images(), precision=torch.bfloat16) is model
    assert fused(model, images()) is not model


def test_a_network_with_hooks_is_not_fused():
    model = settled(short("resnet8"))
    model.layer1[0].conv1.register_forward_hook(lambda *_: None)
    assert fused(model, images()) is model


def test_fusing_does_not_change_the_training_mode():
    model = short("resnet8").train()
    fused(model, images())
    assert all(module.training for module in model.modules())


def test_a_network_whose_outputs_would_change_is_not_fused(monkeypatch):
    model = Named().eval()
    monkeypatch.setattr("tersor.graph.fused_inference._is_relu", lambda module: isinstance(module, nn.ReLU6))
    assert fused(model, 100 * images()) is model


@needs_bfloat16
def test_a_fused_network_in_bfloat16_has_no_larger_error():
    model = settled(short("resnet8"))
    faster, given = fused(model, images(), precision=torch.bfloat16), images(16, seed=2)
    assert passes(faster) == 7
    with torch.no_grad():
        exact = model(given)
        with torch.autocast("cpu", torch.bfloat16):
            errors = [float((each(given).float() - exact).abs().mean()) for each in (faster, model)]
    assert 0 < errors[0] < 1.5 * errors[1], errors


class Shuffled(nn.Module):
    """The input of the second convolution is contiguous, and the addend channels_last."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        features = self.first(x).relu()
        halves = features.reshape(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return (features + self.second(halves.contiguous())).relu()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_a_fused_addition_accepts_any_memory_format(dtype):
    network = Shuffled().eval()
    found = fused(network, images(), precision=None if dtype == torch.float32 else dtype)
    assert passes(found) == 2
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs, expected = found(images()), network(images())
    assert torch.allclose(outputs.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 0.05)
