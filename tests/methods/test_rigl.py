"""RigL: one update computed by hand, constant sparsity, and the distribution over layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.errors import InputError
from tersor.methods.rigl import RigL, layer_counts
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import dense_weight, mask_of

DRAW = torch.Generator().manual_seed(1)
IMAGES, LABELS = torch.randn(16, 3, 6, 6, generator=DRAW), torch.arange(16) % 3


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5 * 4, 3))


def begun(steps=40, **options):
    model = network()
    attached = RigL(**{"sparsity": 0.8, "every": 4, **options}).attach(model, AttachContext(steps=steps))
    attached.begin()
    return model, attached


def gradients(model):
    model.zero_grad()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    return {place: dense_weight(model[place]).grad.clone() for place in (0, 2)}


def optimizers(model):
    return {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        "adamw": torch.optim.AdamW(model.parameters(), lr=0.02),
    }


def pair_of(layer):
    return mask_of(layer).mask, dense_weight(layer)


def memory(optimizer, weight):
    return [each for each in optimizer.state[weight].values() if each.shape == weight.shape]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_change_by_hand(name):
    """The smallest weights are masked; those with the largest dense gradients grow from zero, without momentum."""
    model, attached = begun()
    optimizer = optimizers(model)[name]
    attached.bind(optimizer)
    for step in range(4):
        before = {
            place: (mask_of(model[place]).mask.clone(), dense_weight(model[place]).detach().clone()) for place in (0, 2)
        }
        dense = gradients(model)
        optimizer.step()
        for place, (mask, weight) in before.items():
            if step < 3:
                assert torch.equal(mask_of(model[place]).mask, mask)
                assert torch.equal(dense_weight(model[place])[~mask], weight[~mask]), "what is masked does not move"
                assert torch.equal(dense_weight(model[place]).grad, dense[place] * mask)
    grown = 0
    for place, (mask, _) in before.items():
        new, weight = mask_of(model[place]).mask, dense_weight(model[place]).detach()
        count = math.floor(int(mask.sum()) * 0.3 * (1 + math.cos(math.pi * 4 / 30)) / 2)
        assert count > 2
        was, gradient, kept = (
            mask.flatten().tolist(),
            dense[place].abs().flatten().tolist(),
            weight.abs().flatten().tolist(),
        )
        there = sorted((index for index, each in enumerate(was) if each), key=lambda index: -kept[index])
        comes = set(new.flatten().nonzero().flatten().tolist()) - set(there)
        assert len(there) == int(new.sum())
        # a dropped weight with a larger gradient grows again and keeps its value
        stays = set(there[: len(there) - count])
        free = sorted(set(range(len(was))) - stays, key=lambda index: -gradient[index])
        assert set(new.flatten().nonzero().flatten().tolist()) == stays | set(free[:count])
        assert comes
        for index in comes:
            assert weight.flatten()[index] == 0
            assert all(each.flatten()[index] == 0 for each in memory(optimizer, dense_weight(model[place])))
        assert all(bool(each.flatten()[list(stays)].any()) for each in memory(optimizer, dense_weight(model[place])))
        grown += len(comes)
    changed = attached.metrics["masks"][0]["changed"]
    assert changed[1] == pytest.approx(2 * grown / 288, abs=1e-5)


def test_the_sparsity_is_constant_and_masks_are_fixed_after_the_end():
    model, attached = begun(steps=40, end=0.5)
    optimizer = optimizers(model)["sgd"]
    handle = attached.bind(optimizer)
    counts, masks = set(), []
    for _ in range(40):
        gradients(model)
        optimizer.step()
        counts.add(tuple(int(mask_of(model[place]).mask.sum()) for place in (0, 2)))
        masks.append(torch.cat([mask_of(model[place]).mask.flatten() for place in (0, 2)]).clone())
    handle.remove()
    attached.finish()
    assert len(counts) == 1
    assert sum(counts.pop()) == 288 - round(0.8 * 288)
    assert not torch.equal(masks[2], masks[18])
    assert all(torch.equal(mask, masks[20]) for mask in masks[20:])
    assert attached.metrics["masks"][0]["steps"] == [0, 4, 8, 12, 16]


def test_the_initial_mask_keeps_the_largest_weights_of_each_layer():
    model, _ = begun(distribution="uniform")
    for place in (0, 2):
        size, mask = dense_weight(model[place]).detach().abs(), mask_of(model[place]).mask
        assert size[mask].min() > size[~mask].max()
        assert int(mask.sum()) == pytest.approx(0.2 * mask.numel(), abs=1)


SHAPES = {"a": torch.Size([16, 3, 3, 3]), "b": torch.Size([16, 16, 3, 3]), "c": torch.Size([64, 64, 3, 3])}


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_layer_counts_follow_the_distribution(distribution, sparsity):
    found = layer_counts(SHAPES, sparsity, distribution)
    sizes = {name: shape.numel() for name, shape in SHAPES.items()}
    assert sum(found.values()) == sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    density = {name: found[name] / sizes[name] for name in sizes}
    assert all(0 < each <= 1 for each in density.values())
    if distribution == "uniform":
        assert list(density.values()) == pytest.approx([1 - sparsity] * 3, abs=0.003)
    else:
        raw = {name: sum(shape) / shape.numel() for name, shape in SHAPES.items()}
        free = [name for name in sizes if density[name] < 1]
        assert free
        for name in free:
            assert density[name] / density[free[0]] == pytest.approx(raw[name] / raw[free[0]], rel=0.02)
        assert min(density.values()) == density["c"]


def test_few_weights_and_many_layers():
    shapes = {str(place): torch.Size([2, 1]) for place in range(5)} | {"large": torch.Size([40, 5])}
    found = layer_counts(shapes, 0.97, "uniform")
    assert sum(found.values()) == 210 - round(0.97 * 210)
    assert min(found.values()) == 1
    for distribution in ("erk", "uniform"):
        assert set(layer_counts(shapes, 0.99, distribution).values()) == {1}, "as many as layers, not fewer"


def test_zero_steps_raise():
    with pytest.raises(InputError, match="rigl needs training, but there are 0 steps"):
        RigL().attach(network(), AttachContext())
