import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor import tasks
from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.batch import Batch
from tersor.graph.capture import capture
from tersor.graph.parametrization import parametrization_input
from tersor.methods.weight_pruning import WeightPruning
from tersor.quantization import sensitivity as measurement
from tersor.quantization.grid import Grid
from tersor.quantization.observers import weight_grid
from tersor.quantization.quantizer_options import Precision
from tersor.quantization.quantizers import insert_quantizers
from tersor.quantization.sensitivity import sensitivity
from tersor.training.context import AttachContext

VNNI = Target(cpu="vnni")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(F.relu(x + self.conv2(x)).mean((2, 3)))


def images(count=12, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def laid(model=None, target=VNNI):
    graph = capture(model or Small().eval(), images())
    return insert_quantizers(graph, Precision(), exclude=(), target=target, method="test")


@torch.no_grad()
def slowly(model, name, bits, x):
    """The logits of a copy in which the weight is replaced by its rounded values."""
    rounded = copy.deepcopy(model)
    weight = rounded.get_submodule(name).weight
    scale, _ = weight_grid(weight, Grid.signed(bits), weight_range="mse")
    for channel, step in zip(weight, scale, strict=True):
        channel.copy_((channel / step).round().clamp(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) * step)
    return rounded(x)


def test_one_weight_is_rounded_and_all_else_in_float():
    model = Small().eval()
    plain, x = copy.deepcopy(model).requires_grad_(False), images()
    labels = torch.arange(12) % 5
    requested = [(name, bits) for name in ("linear", "conv1", "conv2") for bits in (2, 3, 8)]
    data = [Batch(x[:7], labels[:7]), Batch(x[7:], labels[7:])]
    found = list(sensitivity(laid(model), data, requested, target=VNNI))
    assert [(cost.layer, cost.bits) for cost in found] == requested
    before = plain(x)
    for cost in found:
        after = slowly(plain, cost.layer, cost.bits, x)
        assert cost.error == pytest.approx(float((after - before).square().mean() / before.square().mean()), rel=1e-4)
        right = [(logits.argmax(1) == labels).float().mean() for logits in (before, after)]
        assert cost.drop == pytest.approx(100 * float(right[0] - right[1]), abs=1e-4)
    assert {round(cost.drop) for cost in found} != {0}
    assert found[0].error > found[1].error > found[2].error > 0


def test_the_network_is_restored_after_each_measurement():
    quantizers = laid(Small())
    graph = quantizers.graph
    graph.bn1.eval()
    modes = [module.training for module in graph.modules()]
    frozen = copy.deepcopy(graph).eval()(images())
    for _ in zip(range(2), sensitivity(quantizers, [images()], [("conv1", 2), ("conv2", 2)], target=VNNI), strict=True):
        assert not quantizers.enabled
        assert [quantizers.of_weight(name).grid for name in quantizers.layers] == [Grid.signed(8)] * 3
        assert [module.training for module in graph.modules()] == modes
        assert torch.equal(graph.eval()(images()), frozen)
        graph.train()
        graph.bn1.eval()


def test_without_labels_there_is_no_drop():
    (cost,) = sensitivity(laid(), [images()], [("conv1", 2)], target=VNNI)
    assert cost.drop is None


def test_masked_weights_stay_zero():
    model = WeightPruning(sparsity=0.5).attach(Small().eval(), AttachContext(steps=0))
    model.finish()
    quantizers = laid(model.model)
    shown = parametrization_input(quantizers.graph.conv1, quantizers.of_weight("conv1"))
    (cost,) = sensitivity(quantizers, [images()], [("conv1", 2)], target=VNNI)
    assert cost.error > 0
    assert (quantizers.graph.conv1.weight[shown == 0] == 0).all()


def test_for_a_saturating_processor_the_error_is_measured_with_its_grids():
    errors = [
        next(sensitivity(laid(target=target), [images()], [("conv1", 8)], target=target)).error
        for target in (VNNI, Target(cpu="avx2"))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("data", [[], [images(0)]])
def test_data_without_images_raises(data):
    with pytest.raises(InputError, match="the data contains no images"):
        next(sensitivity(laid(), data, [("conv1", 2)], target=VNNI))


def test_an_empty_batch_is_ignored():
    batch = images(), torch.arange(12) % 5
    empty = images(0), torch.zeros(0).long()
    found = [next(sensitivity(laid(), data, [("conv1", 2)], target=VNNI)) for data in ([batch], [batch, empty])]
    assert found[0] == found[1]
    assert found[0].drop is not None


def test_nonfinite_values_raise():
    with pytest.raises(InputError, match="not finite"):
        next(sensitivity(laid(), [images() / 0], [("conv1", 2)], target=VNNI))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.small = Small()

    def forward(self, x):
        values = self.small(x)
        return {"values": values[:, :3], "others": [values[:, 3:] * 100, values.argmax(1)]}


def test_the_error_of_several_outputs_is_averaged():
    model, x = Two().eval(), images()
    data = [x[:7], x[7:]]
    (cost,) = sensitivity(laid(model), data, [("small.linear", 3)], target=VNNI)
    with torch.no_grad():
        before, after = model.small(x), slowly(model.small, "linear", 3, x)
    parts = [
        float((after[:, part] - before[:, part]).square().sum() / before[:, part].square().sum())
        for part in (slice(3), slice(3, 5))
    ]
    assert cost.error == pytest.approx(sum(parts) / 2, rel=1e-4)
    assert cost.drop is None


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_the_drop_is_in_the_metric_of_the_task(task):
    """A worse metric is a positive drop, whichever direction is better."""
    model, x, goal = Small().eval(), images(), tasks.build(task)
    with torch.no_grad():
        before, after = (goal.predictions(each) for each in (model(x), slowly(model, "linear", 2, x)))
    targets = before if task == "regression" else before.long()
    (cost,) = sensitivity(laid(model), [(x, targets)], [("linear", 2)], target=VNNI, task=goal)
    lost = abs(goal.score([(after, targets)]) - goal.score([(before, targets)]))
    assert cost.drop == pytest.approx(lost, rel=1e-4)
    assert cost.drop > 0


@pytest.mark.parametrize("kept", [0, 7 * 5 * 4])
def test_outputs_that_are_not_cached_are_computed_again(monkeypatch, kept):
    """With no cache, and with a cache for the outputs of the first batch."""
    x = images()
    data, requested = [(x[:7], torch.zeros(7).long()), (x[7:], torch.ones(5).long())], [("conv1", 2), ("linear", 3)]
    expected = list(sensitivity(laid(), data, requested, target=VNNI))
    monkeypatch.setattr(measurement, "KEPT_BYTES", kept)
    quantizers = laid()
    assert list(sensitivity(quantizers, data, requested, target=VNNI)) == expected
    assert all(cost.error > 0 for cost in expected)
    assert not quantizers.enabled
