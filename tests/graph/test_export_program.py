from __future__ import annotations

import sysconfig
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.graph import export_program, stack_traces
from tersor.graph.aten import operator_name
from tersor.graph.capture import capture

IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "logits features")


class Returns(nn.Module):
    def __init__(self, build):
        super().__init__()
        self.conv, self.build = nn.Conv2d(3, 2, 1), build

    def forward(self, x):
        x = self.conv(x)
        return self.build(x.mean((2, 3)), x)


@pytest.mark.parametrize(
    "build",
    [
        lambda a, b: (a, [b, a]),
        lambda a, b: {"logits": a, "more": {"features": b}},
        lambda a, b: Pair(a, b),
        lambda a, _: (a, None),
    ],
    ids=["tuple and list", "dict", "named tuple", "none"],
)
def test_the_captured_network_returns_the_same_containers(build):
    model = Returns(build)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 4, 4)
        expected, found = model(images), capture(model, IMAGES)(images)
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected)
    if isinstance(expected, Pair):
        assert found._fields == expected._fields


class Reshapes(nn.Module):
    """Sizes from the shape, a slice over the full range, and a conversion without effect."""

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.view(n, c, h * w)[:].to(x.dtype)
        return x.reshape(n, c, h, w).transpose(1, 2).contiguous().view(n, -1)


def test_operators_without_effect_are_removed_and_batch_sizes_stay_dynamic():
    model = Reshapes()
    graph = capture(model, IMAGES)
    names = [operator_name(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert names == ["sym_size", "reshape", "reshape", "transpose", "contiguous", "reshape"]
    (size,) = (node for node in graph.graph.nodes if operator_name(node) == "sym_size")
    assert len(size.users) == 1, "the last reshape, whose other size is -1; elsewhere the batch is -1"
    for count in (1, 3):
        images = torch.randn(count, 3, 4, 4)
        assert torch.equal(graph(images), model(images))


class InPlace(nn.Module):
    def forward(self, x):
        y = x.mul(2)
        y += 1
        y[:, 0] = 0
        return y.relu_()


def test_in_place_operators_are_kept():
    graph, model = capture(InPlace(), IMAGES), InPlace()
    images = torch.randn(3, 3, 4, 4)
    before = images.clone()
    assert torch.equal(graph(images), model(images))
    assert torch.equal(images, before)


class ReadsShapes(nn.Module):
    """Branches on shapes, types and options."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU()])

    def forward(self, x, mask=None, *, twice=True):
        if x.shape[-1] == 4 and mask is None:
            x = x + 1
        for layer in self.layers[:2]:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x) * (2 if twice else 1)
        return x


def test_python_branches_on_shapes_types_and_options_are_followed():
    model = ReadsShapes()
    graph = capture(model, IMAGES)
    assert torch.equal(graph(IMAGES), model(IMAGES))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layers.0", "layers.1"]


def test_capture_preserves_requires_grad():
    model = Returns(lambda a, _: a)
    model.conv.requires_grad_(requires_grad=False)
    graph = capture(model, IMAGES)
    assert not any(each.requires_grad for each in [*model.parameters(), *graph.parameters()])
    assert not graph(IMAGES).requires_grad


class Branches(nn.Module):
    def forward(self, x):
        if x.mean() > 0:
            x = x + 1
        return x


def test_the_error_names_the_line_of_the_network_if_tersor_is_installed_in_site_packages(monkeypatch):
    installed = f"{sysconfig.get_path('purelib')}/tersor/graph/export_program.py"
    exporter = compile(Path(export_program.__file__).read_text(), installed, "exec")
    namespace = {"__name__": "installed", "__file__": installed}
    monkeypatch.setattr(stack_traces, "_TERSOR", f"{sysconfig.get_path('purelib')}/tersor")
    exec(exporter, namespace)
    with pytest.raises(InputError, match=r"\(test_export_program.py, line \d+: if x.mean\(\) > 0:\)"):
        namespace["exported"](Branches(), IMAGES)
