"""Networks for which rewrites by type or shape are often wrong: outputs of torch and of the file must not change."""

from __future__ import annotations

import types
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d, StdConv2d
from torch import nn

import tersor
from tersor.deploy.integer_graph import IntegerLayer, to_integer_graph
from tersor.evaluation.session import open_session
from tersor.graph.capture import layer_of

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WIDTH = 6


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, values):
        return F.silu(super().forward(values))


class Doubled(nn.Conv2d):
    def forward(self, values):
        return 2 * super().forward(values) + 1


class Scaled(nn.Linear):
    def forward(self, values):
        return F.linear(values, self.weight * 3, self.bias)


class Computed(nn.Conv2d):
    """Its convolution has a weight that is computed."""

    def _conv_forward(self, values, weight, bias):
        return super()._conv_forward(values, weight - 0.2, bias)


class Leaky(nn.ReLU):
    def forward(self, values):
        return F.leaky_relu(values, 0.5)


class Shifted(nn.Identity):
    def forward(self, values):
        return values + 1


class Largest(nn.MaxPool2d):
    def forward(self, values):
        return -super().forward(-values)


class Tokens(nn.Module):
    """BatchNorm of values (N, T, F) normalizes dimension T."""

    def __init__(self, tokens, norm=nn.BatchNorm1d):
        super().__init__()
        self.stem, self.mix, self.norm = nn.Conv2d(3, tokens, 2, 2), nn.Linear(16, 16), norm(tokens)
        self.last = nn.Linear(tokens, WIDTH)

    def forward(self, images):
        return self.last(F.relu(self.norm(self.mix(self.stem(images).flatten(2)))).mean(2))


class Twice(nn.Module):
    """One layer with two norms, one norm after two layers, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, WIDTH, 1)
        self.one, self.other = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)

    def forward(self, images):
        a, b = self.a(images), self.b(images)
        return self.c(self.c(F.relu(self.one(a) + self.other(a)) + self.one(b))).mean((2, 3))


class Reads(nn.Module):
    """Reads the dtype, shape, device and values of a weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, images):
        weight = self.conv.weight
        maps = self.norm(self.conv(images.to(weight.dtype).to(weight.device))) / weight.shape[0]
        found = self.last(F.relu(maps).mean((2, 3))) * self.norm.running_var
        return F.linear(found, self.last.weight) + weight.mean()


class Named(nn.Module):
    """Nodes named like attributes of every module: `to`, `type`, `float`, `half`; and one named `to_`."""

    def __init__(self):
        super().__init__()
        self.conv, self.to_, self.last = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, images):
        maps = self.conv(images.to(torch.float32)) + self.to_(images.float())
        return self.last(maps.type(torch.float32)).mean((2, 3))


def convolved(*behind):
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3), *behind, nn.Conv2d(WIDTH, WIDTH, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def patched():
    model = convolved(nn.BatchNorm2d(WIDTH), nn.ReLU())
    model[0].forward = types.MethodType(lambda self, x: 2 * nn.Conv2d.forward(self, x), model[0])
    return model


def hooked(place, *, before=False):
    model = convolved(nn.BatchNorm2d(WIDTH), nn.ReLU())
    if before:
        model[place].register_forward_pre_hook(lambda _, given: (given[0] * 2,))
    else:
        model[place].register_forward_hook(lambda _, __, found: found * 2 + 1)
    return model


KINDS = {
    "timm's norm with SiLU": lambda: convolved(BatchNormAct2d(WIDTH, act_layer=nn.SiLU)),
    "timm's norm with Hardswish": lambda: convolved(BatchNormAct2d(WIDTH, act_layer=nn.Hardswish)),
    "a norm with an activation of its own": lambda: convolved(BatchNormReLU(WIDTH)),
    "as many tokens as features": lambda: Tokens(16),
    "fewer tokens than features": lambda: Tokens(12),
    "tokens and SyncBatchNorm": lambda: Tokens(16, nn.SyncBatchNorm),
    "vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()),
    "a convolution with its own forward": lambda: convolved(nn.ReLU(), Doubled(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)),
    "a convolution with its own weight": lambda: convolved(Computed(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)),
    "timm's standardized convolution": lambda: convolved(StdConv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)),
    "a linear layer with its own forward": lambda: nn.Sequential(
        nn.Flatten(), Scaled(192, WIDTH), nn.BatchNorm1d(WIDTH)
    ),
    "a forward of the instance": patched,
    "a hook on a convolution": lambda: hooked(0),
    "a hook before a convolution": lambda: hooked(0, before=True),
    "a hook on a norm": lambda: hooked(1),
    "SyncBatchNorm": lambda: convolved(nn.SyncBatchNorm(WIDTH), nn.ReLU()),
    "twice": Twice,
    "a norm that is not affine": lambda: convolved(nn.BatchNorm2d(WIDTH, affine=False), nn.ReLU()),
    "a norm without a bias": lambda: convolved(nn.BatchNorm2d(WIDTH, bias=False), nn.ReLU()),
    "reads": Reads,
    "names": Named,
    "another ReLU": lambda: convolved(nn.BatchNorm2d(WIDTH), Leaky()),
    "another Identity": lambda: convolved(nn.BatchNorm2d(WIDTH), Shifted()),
    "another pooling": lambda: convolved(nn.BatchNorm2d(WIDTH), Largest(2)),
    "two norms in a row": lambda: convolved(nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)),
}
"""Each (N, 3, 8, 8) -> (N, 6)."""
QUICK = (
    *("timm's norm with SiLU", "a norm with an activation of its own", "as many tokens as features"),
    *("a convolution with its own forward", "a linear layer with its own forward", "a hook on a norm"),
    *("SyncBatchNorm", "twice", "reads", "names"),
)
SLOW = tuple(kind for kind in KINDS if kind not in QUICK)


class Together(nn.Module):
    """Several kinds in parallel, so that one export suffices for all: (N, 3, 8, 8) -> (N, 6 * kinds)."""

    def __init__(self, kinds):
        super().__init__()
        self.kinds = nn.ModuleList(KINDS[kind]() for kind in kinds)

    def forward(self, images):
        return torch.cat([kind(images) for kind in self.kinds], 1)


def with_statistics(model):
    """Give every BatchNorm statistics, factors and shifts whose loss would change the outputs."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.2, 1)
            for each, low in ((module.weight, 0.5), (module.bias, -1)):
                if each is not None:
                    nn.init.uniform_(each, low, 1.5)
    return model.eval()


def apart(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Outputs of the original, of the quantized network and of its file, for several kinds in one network."""

    @cache
    def of(kinds):
        torch.manual_seed(0)
        model = with_statistics(Together(kinds))
        quantized = tersor.quantize(model, [IMAGES])
        path = tersor.export(quantized, IMAGES, tmp_path_factory.mktemp("rewrites") / "model.onnx")
        of_file = torch.from_numpy(open_session(path, "onnxruntime").run(IMAGES.numpy()))
        with torch.no_grad():
            return model(IMAGES), quantized(IMAGES), of_file

    return of


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_quantized_and_exported_networks_keep_their_outputs(kind, outputs):
    kinds = QUICK if kind in QUICK else SLOW
    at = WIDTH * kinds.index(kind)
    original, quantized, of_file = (each[:, at : at + WIDTH] for each in outputs(kinds))
    assert original.std() > 1e-3
    assert apart(quantized, original) < 0.05
    assert apart(of_file, quantized) < 0.03


@pytest.mark.parametrize("kind", ["SyncBatchNorm", "timm's norm with SiLU", "a norm that is not affine", "vectors"])
def test_a_foldable_batchnorm_is_folded(kind):
    torch.manual_seed(0)
    quantized = tersor.quantize(with_statistics(KINDS[kind]()), [IMAGES])
    network = to_integer_graph(quantized)
    assert not any(isinstance(layer_of(node), nn.modules.batchnorm._BatchNorm) for node in network.graph.nodes)
    assert any(isinstance(layer_of(node), IntegerLayer) for node in network.graph.nodes)


NETWORKS = {
    **dict.fromkeys(("tf_efficientnet_b0", "efficientnet_b0", "mobilenetv3_small_050"), timm.create_model),
    **dict.fromkeys(("regnetx_002", "repvgg_a0", "convnext_atto", "mobilenetv2_050"), timm.create_model),
    **dict.fromkeys(("ghostnet_050", "resnet26d", "mixnet_s", "densenet121", "tf_mixnet_s"), timm.create_model),
    **dict.fromkeys(("mobilenet_v3_small", "regnet_x_400mf", "mnasnet0_5"), torchvision.models.get_model),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_timm_and_torchvision_networks_keep_their_outputs(name, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 64)
    model = NETWORKS[name](name, num_classes=10).train()
    with torch.no_grad():
        for _ in range(3):
            model(images)
    quantized = tersor.quantize(model, [images])
    path = tersor.export(quantized, images, tmp_path / "model.onnx")
    with torch.no_grad():
        original, of_torch = model.eval()(images), quantized(images)
    of_file = torch.from_numpy(open_session(path, "onnxruntime").run(images.numpy()))
    moved = apart(of_torch, original)
    assert moved < 0.5
    assert apart(of_file, of_torch) < max(2 * moved, 0.01)
