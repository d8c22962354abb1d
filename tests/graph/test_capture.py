from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.graph.aten import operator_name
from tersor.graph.capture import (
    INPUTS,
    capture,
    has_batch_dimension,
    is_size,
    parameter_reads,
    rank_of,
    sole_user,
    values_into,
)
from tersor.graph.forward_call import InputSpec
from tersor.models import build
from toy_networks import short

SHORT_NETWORKS = {"resnet8": (32, {}), "mobilenet3": (64, {}), "densenet": (64, {})}
NETWORKS = {
    "resnet18": (64, {}),
    "squeezenet1_1": (64, {}),
}
SLOW_NETWORKS = {
    "resnet20": (32, {}),
    "mobilenet_v3_small": (64, {}),
    "mnasnet0_5": (64, {}),
    "regnet_y_400mf": (64, {}),
    "shufflenet_v2_x1_0": (64, {}),
    "mobilenet_v2": (64, {}),
    "alexnet": (64, {}),
    "vgg11_bn": (32, {}),
    "resnext50_32x4d": (64, {}),
    "regnet_x_400mf": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnet_v2_s": (64, {}),
    "densenet121": (64, {}),
    "convnext_tiny": (64, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "maxvit_t": (224, {}),
    "vit_b_32": (64, {"image_size": 64}),
}
IN_TRAINING_ALONE = {"efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "swin_t", "swin_v2_t", "maxvit_t"}
"""Networks with stochastic depth, which is not part of the graph."""
COMPUTED = {"swin_v2_t": "attn.qkv.bias"}
"""Networks that compute a bias from a Parameter: the graph has a new Parameter instead."""

every_network = pytest.mark.parametrize(
    "name", [*SHORT_NETWORKS, *NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_NETWORKS)]
)


def network(name):
    """The network with random weights, and images for it."""
    size, options = (SHORT_NETWORKS | NETWORKS | SLOW_NETWORKS)[name]
    torch.manual_seed(0)
    if name == "resnet20":
        model = build(name, 10)
    elif name in SHORT_NETWORKS:
        model = short(name)
    else:
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    return model, torch.randn(2, 3, size, size)


def outputs_of(model, images, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(images)


@every_network
def test_the_graph_is_the_network(name):
    model, images = network(name)
    graph = capture(model, images)

    state, found = model.state_dict(), graph.state_dict()
    own = {key for key in state if key.endswith(COMPUTED.get(name, "-"))}
    assert state.keys() - found.keys() == own, "a computed value has a key of its own"
    assert len(found.keys() - state.keys()) == len(own)
    assert all(value.data_ptr() == state[key].data_ptr() for key, value in found.items() if key in state)
    assert {id(each) for key, each in model.named_parameters() if key not in own} <= set(map(id, graph.parameters()))
    for count in (1, 2, 5):
        several = torch.cat([images, images, images])[:count]
        torch.testing.assert_close(
            outputs_of(graph.eval(), several), outputs_of(model.eval(), several), rtol=1e-4, atol=1e-5
        )
    if name in IN_TRAINING_ALONE:
        return
    original = copy.deepcopy(model).train()  # with its own running statistics
    assert torch.equal(outputs_of(graph.train(), images), outputs_of(original, images))
    for (key, moved), (_, expected) in zip(graph.named_buffers(), original.named_buffers(), strict=True):
        assert torch.equal(moved, expected), key


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_auxiliary_heads_are_not_captured(name, size):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10, init_weights=False)
    images = torch.randn(2, 3, size, size)
    graph = capture(model, images)
    heads = {key for key in model.state_dict() if key.startswith(("aux", "AuxLogits"))}
    assert heads
    assert set(graph.state_dict()) == set(model.state_dict()) - heads
    assert torch.equal(outputs_of(graph.eval(), images), outputs_of(model.eval(), images))
    assert outputs_of(graph.train(), images).shape == (2, 10)


def test_gradients_reach_the_same_parameters():
    model, images = network("resnet8")
    graph = capture(model, images).train()
    graph(images).sum().backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    model.train()(images).sum().backward()
    assert all(torch.equal(parameter.grad, found[key]) for key, parameter in model.named_parameters())


def test_the_weights_of_the_original_load_into_the_graph():
    model, images = network("resnet8")
    other = short("resnet8")
    graph = capture(other, images)
    graph.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(graph.eval(), images), outputs_of(model.eval(), images))
    assert torch.equal(outputs_of(other.eval(), images), outputs_of(model, images))


@pytest.mark.parametrize("training", [True, False])
def test_capture_preserves_the_training_modes_of_network_and_graph(training):
    model, images = network("resnet8")
    model.train(training)
    frozen = model.layer2[0].bn1
    frozen.train(not training)
    before = {key: module.training for key, module in model.named_modules()}
    graph = capture(model, images)
    assert {key: module.training for key, module in model.named_modules()} == before
    assert {key: module.training for key, module in graph.named_modules() if key in before} == {
        key: mode for key, mode in before.items() if key in dict(graph.named_modules())
    }
    assert graph.layer2.get_submodule("0.bn1") is frozen


def test_a_graph_is_captured_once():
    model, images = network("resnet8")
    graph = capture(model, images)
    assert capture(graph, images) is graph
    assert graph.meta[INPUTS] == (InputSpec(None, (3, 32, 32), "float32"),)


class Everything(nn.Module):
    """Parameters, buffers and constants, and dropout written in three ways; two calls never drop."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.register_buffer("kept", torch.full((4, 1, 1), 2.0))
        self.register_buffer("unsaved", torch.full((4, 1, 1), 3.0), persistent=False)
        self.plain = torch.full((4, 1, 1), 1.5)

    def forward(self, x):
        x = self.conv(x) * self.scale * self.kept + self.unsaved - self.plain
        x = self.block(x) + torch.linspace(0, 1, 8)
        x = F.dropout(x, 0.3, training=self.training)
        x = F.dropout(F.dropout2d(x, 0.4, False), training=False)
        return F.dropout(x.mean((2, 3)), 0.5, self.training)


class Block(nn.Module):
    """Reads its training mode twice: as an argument, and as a condition in a method that forward calls."""

    def __init__(self):
        super().__init__()
        self.inner = Noisy()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.inner(F.dropout2d(self.conv(x), 0.5, training=self.training))


class Noisy(nn.Module):
    def forward(self, x):
        return self.shaken(x)

    def shaken(self, x):
        return x + torch.randn(x.shape) if self.training else x


SMALL = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_recorded_in_eval_mode_and_drops_in_training(training):
    model = Everything().train(training)
    keys, attributes = set(model.state_dict()), set(vars(model))
    graph = capture(model, SMALL)
    assert all(module.training is training for module in graph.modules())
    for each in (graph, copy.deepcopy(graph)):
        assert torch.equal(outputs_of(each.eval(), SMALL), outputs_of(model.eval(), SMALL))
        assert torch.equal(outputs_of(each, SMALL, seed=1), outputs_of(each, SMALL))
        assert set(each.state_dict()) == keys
        model.train()
        model.block.inner.eval()  # the noise that is added in training only is not part of the graph
        assert torch.equal(outputs_of(each.train(), SMALL), outputs_of(model, SMALL))
        assert not torch.equal(outputs_of(each, SMALL, seed=1), outputs_of(each, SMALL))
    assert set(vars(model)) == attributes, "capturing leaves nothing behind in the original"


def test_the_captured_graph_contains_the_expected_modules_and_operators():
    nodes = list(capture(Everything(), SMALL).graph.nodes)
    called = [node.target for node in nodes if node.op == "call_module"]
    assert called == ["conv", "block.conv", "dropout_0", "dropout_1", "dropout_2"]
    assert [operator_name(node) for node in nodes if node.op == "call_function"] == [
        "mul", "mul", "add", "sub", "linspace", "add", "mean"
    ]  # fmt: skip
    assert not [node for node in nodes if node.op == "call_method"]


def test_a_wrapped_network_is_captured():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.clamp(-1, 1))

    model, images = network("resnet8")
    graph = capture(Wrapper(model).eval(), images)
    assert torch.equal(outputs_of(graph, images), outputs_of(model.eval(), images.clamp(-1, 1)))
    assert "inner.layer1.0.conv1" in {node.target for node in graph.graph.nodes}


def test_parametrized_layers_are_captured_as_single_modules():
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    model, images = network("resnet8")
    parametrize.register_parametrization(model.layer1[0].conv1, "weight", Half())
    graph = capture(model.eval(), images)
    assert torch.equal(outputs_of(graph, images), outputs_of(model, images))
    assert set(graph.state_dict()) == set(model.state_dict())
    parametrize.remove_parametrizations(model.layer1[0].conv1, "weight")
    assert torch.equal(outputs_of(graph, images), outputs_of(model, images))


def test_a_layer_that_is_called_twice_keeps_its_shared_parameters():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x))).mean((2, 3))

    model = Twice()
    images = torch.randn(2, 3, 4, 4)
    graph = capture(model, images)
    assert torch.equal(outputs_of(graph, images), outputs_of(model, images))
    assert [node.target for node in graph.graph.nodes].count("conv") == 2


class BranchesOnValues(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class NeedsTwo(nn.Module):
    def forward(self, x, *more):
        return x + len(more[0])


class Loops(nn.Module):
    def forward(self, x):
        for row in x:
            x = x + row
        return x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            BranchesOnValues,
            r"BranchesOnValues cannot be captured: .* of a tensor \(test_capture.py, line \d+: return x if.*Compress",
        ),
        (NeedsTwo, r"NeedsTwo does not run on images \(3, 8, 8\) of float32: tuple index out of range"),
        (Loops, r"the graph of Loops cannot be captured: its forward method fixes the batch size.*it loops"),
    ],
)
def test_a_network_that_cannot_be_captured_raises_and_is_not_changed(kind, message, capfd):
    model = kind().eval()
    before = dict(vars(model))
    with pytest.raises(InputError, match=message):
        capture(model, SMALL)
    assert vars(model) == before
    assert model.training is False
    assert capfd.readouterr() == ("", ""), "the exporter prints nothing"


def test_a_network_still_runs_after_a_failed_capture():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Everything()
            self.second = BranchesOnValues()

        def forward(self, x):
            return self.second(self.first(x))

    model = Breaks().train()
    with pytest.raises(InputError):
        capture(model, SMALL)
    assert all(module.training is True for module in model.modules())
    assert outputs_of(model, torch.randn(2, 3, 8, 8)).shape == (2, 4)


class Shares(nn.Module):
    """A layer that is called twice, a shared shift, and sizes that depend on the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 1), nn.Linear(3, 4)
        self.shift = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        x = self.conv(F.relu(self.conv(x + self.shift))) * self.shift
        windows = x.reshape(x.shape[0] * 4, 3, 16)
        return self.linear(windows.mean(-1).reshape(x.shape[0], 4, 3).mean(1))


def test_parameter_reads_count_nodes():
    model = Shares()
    found = parameter_reads(capture(model, SMALL))
    assert found == {
        id(model.conv.weight): 2,
        id(model.conv.bias): 2,
        id(model.linear.weight): 1,
        id(model.linear.bias): 1,
        id(model.shift): 1,
    }, "one node reads the shift for both"


def test_ranks_sizes_and_readers():
    graph = capture(Shares(), SMALL)
    nodes = {operator_name(node) or str(node.target): node for node in graph.graph.nodes}
    windows = next(node for node in graph.graph.nodes if operator_name(node) == "reshape")
    assert rank_of(windows) == 3
    assert not has_batch_dimension(windows)
    assert has_batch_dimension(nodes["conv"])
    assert rank_of(nodes["linear"]) == 2
    assert all(not is_size(value) for value in values_into(windows))
    assert [operator_name(value) for value in values_into(windows)] == ["mul"]
    assert sole_user(nodes["relu"]).target == "conv"
    assert sole_user(nodes["shift"]) is None
    with torch.no_grad():
        assert graph(torch.ones(7, 3, 8, 8)).shape == (7, 4)


class Remembers(nn.Module):
    """Its forward methods store results: as attributes, in a list, in a dict, as a buffer created in the first call."""

    def __init__(self, *, fails):
        super().__init__()
        self.conv, self.inner, self.fails = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1)), fails
        self.seen, self.by_name, self.last = [], {}, None

    def forward(self, x):
        x = self.inner(self.conv(x))
        self.last = x
        self.inner.attention = x
        self.seen.append(x)
        self.by_name["x"] = x
        if "grid" not in self._buffers:
            self.register_buffer("grid", torch.linspace(0, 1, 8))
        x = x + self.grid + torch.ones(8)
        return x if self.fails is None else self.fails(x)


def as_it_is(model):
    """All attributes of the modules; containers are copied."""
    return [
        (
            module,
            {key: copy.copy(value) if isinstance(value, list | dict) else value for key, value in vars(module).items()},
        )
        for module in model.modules()
    ]


def branches(x):
    return x if x.sum() > 0 else -x


def raises(_):
    raise ValueError("of its own")


@pytest.mark.parametrize("fails", [None, branches, raises])
def test_capture_does_not_change_the_attributes_of_the_network(fails):
    model = Remembers(fails=fails)
    before = as_it_is(model)
    if fails is None:
        graph = capture(model, SMALL)
    else:
        with pytest.raises(InputError):
            capture(model, SMALL)
    for (module, expected), (found, now) in zip(before, as_it_is(model), strict=True):
        assert module is found
        assert now == expected
    if fails is None:
        images = SMALL.clone()
        assert torch.equal(graph(images), model(SMALL))
        assert torch.equal(images, SMALL)


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile", "to_folder"])
@pytest.mark.parametrize("kind", ["module", "parameter"])
def test_an_attribute_with_a_name_reserved_by_the_graph_raises(name, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    setattr(model, name, nn.ReLU() if kind == "module" else nn.Parameter(torch.zeros(1)))
    with pytest.raises(
        InputError, match=f"Sequential has an attribute named '{name}', which is reserved in a captured graph"
    ):
        capture(model, SMALL)
    outer = nn.Sequential(model)
    assert torch.equal(capture(outer, SMALL)(SMALL), outer(SMALL))


def test_a_submodule_named_like_a_python_keyword_raises():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)))
    model[0].add_module("class", nn.ReLU())
    with pytest.raises(InputError, match=r"the name of the submodule 0\.class is a Python keyword"):
        capture(model, SMALL)


@pytest.mark.parametrize("what", ["forward", "hook", "pre-hook"])
def test_hooks_and_a_replaced_forward_of_the_outermost_module_raise(what):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    if what == "forward":
        model.forward = lambda x: model[0](x) + 1
    elif what == "hook":
        model.register_forward_hook(lambda _, __, found: found + 1)
    else:
        model.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    with pytest.raises(InputError, match="a forward method was set on the instance, or forward hooks"):
        capture(model, SMALL)
    outer = nn.Sequential(model).eval()
    assert torch.equal(capture(outer, SMALL)(SMALL), outer(SMALL))
