from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tersor.graph.capture import capture
from tersor.pruning.mask import Mask
from tersor.quantization.equalization import equalize
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dfq.json").read_text())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def conv(inputs, outputs, *, groups=1, bias=False):
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=bias)


def classified(*layers):
    """The `layers` with 5 output channels, and a classifier that is not equalized, as there is no ReLU in between."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))


def flat(*layers):
    return nn.Sequential(nn.Flatten(), *layers)


CHAINS = {  # the network, and the places of first layer, BatchNorm and second layer
    "BatchNorm": (lambda: classified(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), nn.ReLU()), [(0, 1, 3)]),
    "none": (lambda: classified(conv(3, 4), nn.ReLU(), conv(4, 5)), [(0, None, 2)]),
    "biases": (lambda: classified(conv(3, 4, bias=True), nn.ReLU(), conv(4, 5, bias=True)), [(0, None, 2)]),
    "bias and BatchNorm": (
        lambda: classified(conv(3, 4, bias=True), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5)),
        [(0, 1, 3)],
    ),
    "no activation": (lambda: classified(conv(3, 4), nn.BatchNorm2d(4), conv(4, 5)), [(0, 1, 2)]),
    "dropout": (lambda: classified(conv(3, 4), nn.ReLU(), nn.Dropout(0.5), conv(4, 5)), [(0, None, 3)]),
    "fully connected": (
        lambda: flat(nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)),
        [(1, None, 3), (3, None, 5)],
    ),
    "fully connected and BatchNorm": (
        lambda: flat(nn.Linear(192, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
        [(1, 2, 4)],
    ),
    "depthwise": (
        lambda: classified(
            *(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()),
            *(conv(4, 4, groups=4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5)),
        ),
        [(0, 1, 3), (3, 4, 6)],
    ),
    "groups before": (lambda: classified(conv(3, 6, groups=3), nn.ReLU(), conv(6, 5)), [(0, None, 2)]),
    "six in a row": (
        lambda: classified(conv(3, 5), *[each for _ in range(6) for each in (nn.ReLU(), conv(5, 5, groups=5))]),
        [(place, None, place + 2) for place in range(0, 12, 2)],
    ),
}


def unequal(model):
    """Draw weights and statistics at random, with a different range for every channel and some negative gammas."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.mul_(torch.rand(len(layer.weight), *[1] * (layer.weight.ndim - 1)) * 3 + 0.1)
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) and layer.affine and layer.track_running_stats:
            layer.weight.data.copy_((torch.rand(layer.num_features) + 0.1) * torch.randn(layer.num_features).sign())
            layer.bias.data.normal_()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.2, 3)
    return model.eval()


def images(seed=5):
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def ranges(first, norm, second):
    """r1 and r2 of the paper for each channel, as lists of numbers."""
    made = [max(map(abs, row)) for row in first.weight.flatten(1).tolist()]
    if norm is not None:
        folded = zip(norm.weight.tolist(), norm.running_var.tolist(), strict=True)
        made = [r * abs(gamma) / math.sqrt(var + norm.eps) for r, (gamma, var) in zip(made, folded, strict=True)]
    depthwise = isinstance(second, nn.Conv2d) and second.groups > 1
    columns = second.weight if depthwise else second.weight.transpose(0, 1)
    return made, [max(map(abs, column)) for column in columns.flatten(1).tolist()]


def parts(model, places):
    return [None if place is None else model[place] for place in places]


def same_after(model, pairs, x=None):
    """Equalize; check the number of equalized pairs, and that the outputs are the same."""
    x = images() if x is None else x
    before, state = model(x), copy.deepcopy(model.state_dict())
    assert equalize(capture(model, x)) == pairs
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
    assert bool(changed) == bool(pairs)
    return state


@pytest.mark.parametrize("chain", CHAINS)
def test_the_network_computes_the_same_and_ranges_are_equal(chain):
    build, pairs = CHAINS[chain]
    model = unequal(build())
    made, read = ranges(*parts(model, pairs[0]))
    assert made != pytest.approx(read, rel=0.1)
    same_after(model, len(pairs))
    for places in pairs:
        made, read = ranges(*parts(model, places))
        assert made == pytest.approx(read, rel=0.01)


@pytest.mark.parametrize("chain", ["BatchNorm", "biases", "fully connected and BatchNorm"])
def test_factors_equal_the_formula_of_the_paper(chain):
    build, (places,) = CHAINS[chain]
    model = unequal(build())
    first, norm, second = parts(copy.deepcopy(model), places)
    factors = [math.sqrt(made / read) for made, read in zip(*ranges(first, norm, second), strict=True)]
    for channel, s in enumerate(factors):
        for tensor in (first.weight, first.bias) if norm is None else (norm.weight, norm.bias):
            tensor.data[channel] /= s
        second.weight.data[:, channel] *= s
    equalize(capture(model, images()))
    for found, expected in zip(parts(model, places), (first, norm, second), strict=True):
        for one, other in zip(found.parameters(), expected.parameters(), strict=True) if found is not None else ():
            torch.testing.assert_close(one, other)


def of_golden(entry):
    """A layer with the values of an entry in the golden file."""
    state = {key: torch.tensor(value) for key, value in entry.items() if isinstance(value, list)}
    if entry["eps"] is not None:
        layer = nn.BatchNorm2d(len(state["weight"]), eps=entry["eps"])
    else:
        outputs, inputs, *kernel = state["weight"].shape
        groups = entry["groups"]
        layer = nn.Conv2d(inputs * groups, outputs, kernel, groups=groups, bias="bias" in state)
    layer.load_state_dict(state, strict=False)
    return layer


@pytest.mark.parametrize("case", GOLDEN["cases"].values(), ids=GOLDEN["cases"])
def test_weights_equal_those_of_reference_code(case):
    """The reference code folds BatchNorm before it divides; here the division is applied to the BatchNorm."""
    layers = [of_golden(each) for each in case["before"] if each["eps"] != 0]
    behind = [[nn.ReLU()] if isinstance(each, nn.BatchNorm2d) or each.groups > 1 else [] for each in layers]
    chain = [each for layer, relu in zip(layers, behind, strict=True) for each in (layer, *relu)]
    model = nn.Sequential(*chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    first, norm, *rest = layers
    inputs = first.in_channels
    assert equalize(capture(model, torch.randn(2, inputs, 8, 8))) == len(case["after"]) - 1
    for found, expected in zip([fuse_conv_bn_eval(first, norm), *rest], case["after"], strict=True):
        for name, values in expected.items():
            torch.testing.assert_close(getattr(found, name).detach(), torch.tensor(values), rtol=1e-3, atol=1e-5)


def test_parameters_are_kept_as_the_same_objects():
    model = unequal(CHAINS["BatchNorm"][0]())
    before = [id(each) for each in model.parameters()]
    graph = capture(model, images())
    equalize(graph)
    assert [id(each) for each in graph.parameters()] == [id(each) for each in model.parameters()] == before


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 4), conv(4, 4), conv(4, 4)

    def forward(self, x):
        x = self.conv1(x)
        return self.conv3(F.relu(x + self.conv2(F.relu(x))))


class Twice(Residual):
    """The output of the first layer is used twice: by the next layer and in the output of the network."""

    def forward(self, x):
        x = F.relu(self.conv1(x))
        return x, self.conv2(x)


class Again(Residual):
    """Pairs in which the second or the first layer is called twice."""

    def forward(self, x):
        x = F.relu(self.conv1(x))
        return self.conv3(F.relu(self.conv2(F.relu(self.conv2(x)))))


class OneNorm(Residual):
    """Two layers are followed by the same BatchNorm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.sigmoid(self.norm(self.conv1(x)))
        return self.conv3(F.relu(self.norm(self.conv2(x))))


class OneWeight(Residual):
    def __init__(self):
        super().__init__()
        self.conv3.weight = self.conv2.weight

    def forward(self, x):
        return self.conv3(F.sigmoid(self.conv2(F.relu(self.conv1(x)))))


class AlsoRead(Residual):
    """A weight that is also used in a function."""

    def forward(self, x):
        return self.conv2(F.relu(self.conv1(x))) + F.conv2d(x, self.conv1.weight, padding=1)


class Clipped(Residual):
    def forward(self, x):
        return self.conv2(F.relu6(self.conv1(x)))


class NamedRelu(Residual):
    """Calls `self.relu`, which is not a ReLU."""

    def __init__(self):
        super().__init__()
        self.relu = nn.Sigmoid()

    def forward(self, x):
        return self.conv2(self.relu(self.conv1(x)))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


LEFT_ALONE = {
    "ReLU6": lambda: classified(conv(3, 4), nn.ReLU6(), conv(4, 5)),
    "the function relu6": Clipped,
    "groups behind": lambda: classified(conv(3, 4), nn.ReLU(), conv(4, 4, groups=2), nn.Sigmoid(), conv(4, 5)),
    "more channels behind": lambda: classified(conv(3, 5), nn.ReLU(), conv(5, 10, groups=5), nn.Sigmoid(), conv(10, 5)),
    "flattened": lambda: nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)),
    "another axis": lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.Linear(8, 3)),
    "no gamma": lambda: classified(conv(3, 4), nn.BatchNorm2d(4, affine=False), nn.ReLU(), conv(4, 5)),
    "no statistics": lambda: classified(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), conv(4, 5)),
    "residual": Residual,
    "read twice": Twice,
    "called twice": Again,
    "one BatchNorm for two": OneNorm,
    "one weight for two": OneWeight,
    "a weight read by a function": AlsoRead,
    "a module named relu": NamedRelu,
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_pairs_that_cannot_be_equalized_are_not_changed(kind):
    model = unequal(LEFT_ALONE[kind]())
    before = copy.deepcopy(model.state_dict())
    assert equalize(capture(model, images())) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_computed_weight_is_equalized_as_a_parameter_of_the_graph():
    model = unequal(classified(conv(3, 4), nn.ReLU(), Standardized(4, 5, 3)))
    graph, standardized = capture(model, images()), model[2].weight.detach().clone()
    before = graph(images())
    assert equalize(graph) == 1
    torch.testing.assert_close(graph(images()), before, rtol=1e-4, atol=1e-5)
    layer = graph.get_submodule("2.conv2d_1")
    made, read = ranges(graph.get_submodule("0"), None, layer)
    assert made == pytest.approx(read, rel=0.01)
    assert torch.equal(model[2].weight, standardized), "the network keeps the weight that it standardizes"


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.layers(x[:, 0])


def test_batchnorms_over_positions_are_not_equalized():
    """BatchNorm1d after a Linear of (N, L, C) normalizes the L positions."""
    same_after(Positions().eval(), 0)


@pytest.mark.parametrize("chain", ["BatchNorm", "biases", "depthwise"])
def test_dead_channels_are_ignored(chain):
    build, pairs = CHAINS[chain]
    model = unequal(build())
    first, norm, second = parts(model, pairs[0])
    with torch.no_grad():
        (first if norm is None else norm).weight[0] = 0  # its output is its bias
        (second.weight if second.groups > 1 else second.weight.transpose(0, 1))[1] = 0  # an unused channel
    constants = [(first if norm is None else norm).bias[dead].item() for dead in (0, 1)]
    same_after(model, len(pairs))
    assert all(torch.isfinite(each).all() for each in model.parameters())
    assert [(first if norm is None else norm).bias[dead].item() for dead in (0, 1)] == constants
    made, read = ranges(first, norm, second)
    assert made[2:] == pytest.approx(read[2:], rel=0.01)


def masked(layer):
    mask = Mask(layer.weight.shape)
    mask.mask.copy_(
        layer.weight.abs() < layer.weight.abs().flatten(1).amax(1).median() / 2
    )  # the largest weights are masked
    parametrize.register_parametrization(layer, "weight", mask)


@pytest.mark.parametrize("chain", ["BatchNorm", "biases", "depthwise", "fully connected"])
def test_masked_weights_stay_zero_and_are_ignored_in_the_ranges(chain):
    build, pairs = CHAINS[chain]
    model = unequal(build())
    originals = [each.weight for each in model if isinstance(each, nn.Conv2d | nn.Linear)]
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            masked(layer)
    layers = [each for each in model if isinstance(each, nn.Conv2d | nn.Linear)]
    zeros = [layer.weight == 0 for layer in layers]
    same_after(model, len(pairs))
    assert all(torch.equal(layer.weight == 0, zero) for layer, zero in zip(layers, zeros, strict=True))
    assert all(layer.parametrizations.weight.original is each for layer, each in zip(layers, originals, strict=True))
    for places in pairs:
        made, read = ranges(*parts(model, places))
        alive = [place for place in range(len(made)) if made[place] and read[place]]
        assert alive
        assert [made[place] for place in alive] == pytest.approx([read[place] for place in alive], rel=0.01)


@pytest.mark.parametrize(("ready", "pairs"), [(False, 1), (True, 0)])
def test_equalization_passes_through_a_quantizer_only_while_it_is_disabled(ready, pairs):
    quantizer = FakeQuantize(Grid.unsigned(8))
    quantizer.enabled = ready
    same_after(unequal(classified(conv(3, 4), nn.ReLU(), quantizer, conv(4, 5))), pairs)
