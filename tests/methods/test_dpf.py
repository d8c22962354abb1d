"""DPF: three steps of another implementation, the sparsity schedule, and weights that are unmasked again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.errors import InputError
from tersor.methods.dpf import DPF
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import dense_weight, mask_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dpf.json").read_text())
IMAGES, LABELS = torch.tensor(GOLDEN["images"]), torch.tensor(GOLDEN["labels"])


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5 * 4, 3))


def tensors_of(model):
    return {"0.weight": dense_weight(model[0]), "2.weight": dense_weight(model[2])} | dict(
        model[4].named_parameters("4")
    )


def test_three_steps_equal_those_of_the_reference_code():
    model = network()
    attached = DPF().attach(model, AttachContext(steps=10))
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(torch.tensor(GOLDEN["before"][name]))
    optimizer = torch.optim.SGD(model.parameters(), **GOLDEN["optimizer"])
    for step in GOLDEN["steps"]:
        attached._update(step["sparsity"], 0, 0)
        ours = torch.cat([mask_of(model[place]).mask.flatten() for place in (0, 2)])
        theirs = torch.cat([torch.tensor(step["masks"][f"{place}.mask"]).flatten().bool() for place in (0, 2)])
        assert int((ours != theirs).sum()) <= 1, "the code also masks what is as large as the threshold"
        for place in (0, 2):
            mask_of(model[place]).mask.copy_(torch.tensor(step["masks"][f"{place}.mask"]).bool())
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        for name, gradient in step["gradients"].items():
            assert torch.allclose(tensors_of(model)[name].grad, torch.tensor(gradient), atol=1e-6), name
        optimizer.step()
    for name, tensor in tensors_of(model).items():
        assert torch.allclose(tensor, torch.tensor(GOLDEN["after"][name]), atol=1e-6), name


def trained(steps=40, rate=0.2, **options):
    """Sparsity and mask after every step, and the attachment."""
    model = network()
    attached = DPF(**{"sparsity": 0.8, "every": 4, **options}).attach(model, AttachContext(steps=steps))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    handle = attached.bind(optimizer)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
        seen.append(torch.cat([mask_of(model[place]).mask.flatten() for place in (0, 2)]).clone())
    handle.remove()
    attached.finish()
    return model, attached, seen


def test_sparsity_rises_cubically_and_masks_still_change_afterwards():
    _, attached, seen = trained(end=0.5)
    size = len(seen[0])
    for done in range(4, 41):
        reached = done if done == 20 else done // 4 * 4
        wanted = 0.8 * (1 - max(0.0, 1 - reached / 20) ** 3)
        assert int((~seen[done - 1]).sum()) == round(wanted * size), done
    assert seen[2].all(), "no mask before the first"
    assert any(not torch.equal(mask, seen[20]) for mask in seen[21:]), "masks move after the ramp"
    assert any(bool((new & ~old).any()) for old, new in itertools.pairwise(seen)), "weights come back"
    assert attached.metrics["masks"][0]["sparsity"][-1] == pytest.approx(0.8, abs=1 / size)


def test_masks_are_the_largest_dense_weights_of_the_whole_network():
    model, attached, _ = trained(steps=8, rate=0.0, sparsity=0.7)
    together = torch.cat([dense_weight(model[place]).detach().abs().flatten() for place in (0, 2)])
    kept = torch.cat([mask_of(model[place]).mask.flatten() for place in (0, 2)])
    assert together[kept].min() > together[~kept].max()
    assert attached.sparsity == round(0.7 * len(kept)) / len(kept)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_the_final_sparsity_is_exact_for_few_steps(steps):
    model, attached, _ = trained(steps=steps, every=16)
    assert round(attached.sparsity * 288) == round(0.8 * 288)
    assert {mask_of(model[place]).gradient for place in (0, 2)} == {"masked"}


def test_the_final_mask_is_the_last_mask_used_in_training():
    model, _, seen = trained(steps=42)
    assert torch.equal(torch.cat([mask_of(model[place]).mask.flatten() for place in (0, 2)]), seen[-1])


def test_the_floor_limits_the_sparsity_of_each_layer():
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    attached = DPF(sparsity=0.7, floor=0.25, every=2).attach(model, AttachContext(steps=4))
    attached._update(0.7, 0, 0)
    assert int(mask_of(model[0]).mask.sum()) == 27
    assert int(mask_of(model[2]).mask.sum()) == 288 - round(0.7 * 288) - 27


def test_the_schedule_starts_at_the_existing_sparsity():
    model = network()
    DPF(sparsity=0.5, every=2).attach(model, AttachContext(steps=4)).finish()
    again = DPF(sparsity=0.9, every=2).attach(model, AttachContext(steps=100))
    assert again.start == pytest.approx(0.5)
    again.after_step(1, torch.optim.SGD(model.parameters(), lr=0.1))
    assert 0.5 < again.sparsity < 0.6


def test_zero_steps_and_a_large_floor_raise():
    with pytest.raises(InputError, match="dpf needs training, but there are 0 steps"):
        DPF().attach(network(), AttachContext())
    with pytest.raises(InputError, match=r"floor of 0\.2"):
        DPF(sparsity=0.9, floor=0.2).attach(network(), AttachContext(steps=5))
