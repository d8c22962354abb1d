"""Each importance compared with a slow implementation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.errors import InputError
from tersor.pruning.weight_importance import (
    accumulate_gradients,
    function_scores,
    geometric_median,
    gradient_products,
    magnitudes,
    random_scores,
    root_mean_squares,
)

WEIGHT = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
LAYER = nn.Conv2d(3, 4, 2)


@pytest.mark.parametrize(("unit", "count"), [("weight", 48), ("kernel", 12), ("filter", 4)])
def test_magnitudes_are_means_over_a_unit(unit, count):
    rows = WEIGHT.reshape(count, -1).tolist()
    means = [sum(abs(value) for value in row) / len(row) for row in rows]
    squares = [(sum(value**2 for value in row) / len(row)) ** 0.5 for row in rows]
    assert magnitudes(WEIGHT, unit).tolist() == pytest.approx(means)
    assert root_mean_squares(WEIGHT, unit).tolist() == pytest.approx(squares)
    assert len(random_scores(WEIGHT, unit, 3)) == count
    assert torch.equal(random_scores(WEIGHT, unit, 3), random_scores(WEIGHT, unit, 3))
    assert not torch.equal(random_scores(WEIGHT, unit, 3), random_scores(WEIGHT, unit, 4))


def test_fpgm_is_the_sum_of_distances_to_the_other_filters():
    filters = WEIGHT.flatten(1).tolist()
    far = [
        sum(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 for other in filters) for one in filters
    ]
    found = geometric_median(WEIGHT)
    assert torch.allclose(found / found[0], torch.tensor(far) / far[0])
    middle = torch.cat([WEIGHT, WEIGHT.mean(0, keepdim=True)])
    assert int(geometric_median(middle).argmin()) == 4, "what lies in the middle goes first, however large it is"
    assert torch.allclose(geometric_median(WEIGHT), geometric_median(WEIGHT + 5), atol=1e-5)


def test_taylor_importance_is_the_product_of_weight_and_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).train()
    model[0].bias.grad = torch.ones(4)
    batches = [(torch.randn(8, 3, 6, 6), torch.arange(8) % 3) for _ in range(4)]
    seen = []

    def data():
        for images, labels in batches:
            seen.append(len(images))
            yield images, labels

    found = gradient_products(model, {"0": model[0].weight}, data(), 20)["0"]
    assert seen == [8, 8, 8]
    assert model.training
    assert torch.equal(model[0].bias.grad, torch.ones(4))
    model.eval()
    slow = torch.zeros(model[0].weight.shape)
    for images, labels in batches[:3]:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        slow += (model[0].weight * model[0].weight.grad).abs().detach()
    assert torch.allclose(found, slow)
    model.requires_grad_(requires_grad=False)
    assert torch.equal(gradient_products(model, {"0": model[0].weight}, data(), 20)["0"], found), "frozen as well"


def test_gradients_are_summed_over_exactly_the_requested_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    images, labels = torch.randn(24, 3, 6, 6), torch.arange(24) % 3
    batches = zip(images.split(8), labels.split(8), strict=True)
    sums, count = accumulate_gradients(model, {"0.weight": model[0].weight}, batches, 12, whole_batches=False)
    F.cross_entropy(model(images[:12]), labels[:12], reduction="sum").backward()
    assert count == 12
    assert torch.allclose(sums["0.weight"], model[0].weight.grad, atol=1e-5)


def test_taylor_without_labels_raises():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(InputError, match="there is no data"):
        gradient_products(model, {"0": model[0].weight}, None, 8)
    with pytest.raises(InputError, match="no labels"):
        gradient_products(model, {"0": model[0].weight}, [torch.rand(2, 3, 3, 3)], 8)
    with pytest.raises(InputError, match="the data is empty"):
        gradient_products(model, {"0": model[0].weight}, [], 8)


def by_name(weight, name):
    return weight.abs() + (name == "second")


def of_units(layer):
    return torch.arange(layer.out_channels)


def broken(weight):
    return weight[:1]


def infinite(weight):
    return weight / 0


@pytest.mark.parametrize(("function", "unit"), [("by_name", "weight"), ("by_name", "filter"), ("of_units", "filter")])
def test_a_users_importance_function_is_used(function, unit):
    found = function_scores(f"{__name__}:{function}", WEIGHT, unit, name="second", layer=LAYER)
    wanted = torch.arange(4.0) if function == "of_units" else magnitudes(WEIGHT, unit) + 1
    assert torch.allclose(found, wanted)


def test_invalid_scores_of_a_users_function_raise():
    with pytest.raises(
        InputError, match=r"returned a tensor of shape \(1, 3, 2, 2\) for conv1. Return a tensor of the weight's shape"
    ):
        function_scores(f"{__name__}:broken", WEIGHT, "filter", name="conv1", layer=LAYER)
    with pytest.raises(InputError, match="not finite"):
        function_scores(f"{__name__}:infinite", WEIGHT, "filter", name="conv1", layer=LAYER)
    with pytest.raises(InputError, match="has no 'nothing'"):
        function_scores(f"{__name__}:nothing", WEIGHT, "filter", name="conv1", layer=LAYER)
