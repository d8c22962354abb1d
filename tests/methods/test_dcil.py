"""DCIL: two steps of the authors' code, the refined gradient, two sets of statistics, and each option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.graph.capture import capture
from tersor.methods.dcil import DCIL, mutual_loss
from tersor.methods.qat import QAT
from tersor.methods.soft_targets import SoftTargets
from tersor.pruning.dense_path import masks_and_quantizers_disabled
from tersor.pruning.mask import weight_mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.loop import fit
from tersor.training.method import chain
from tersor.training.objective import Objective, Outputs
from tersor.training.options import Training

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dcil.json").read_text())
OF_THE_CODE = {"bn1": "bn1", "block.bn1": "block.bn1", "block.bn2": "block.bn2", "linear": "fc"}
"""Our module names -> those of the authors' code, which end in _part or _full."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Small(nn.Module):
    """The network of golden/dcil.py, with one path."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.block = Block()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(self.block(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


BATCH = Batch(torch.tensor(GOLDEN["images"]), torch.tensor(GOLDEN["labels"]))


def small(seed=0):
    torch.manual_seed(seed)
    return Small().train()


def attached_to(model, steps=100, **options):
    attached = DCIL(**{"sparsity": 0.6, "warmup": 0.0, **options}).attach(model, AttachContext(steps=steps))
    with torch.no_grad():
        for name in ("conv1", "block.conv1", "block.conv2"):
            mask = weight_mask(model.get_submodule(name)).mask
            mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(len(name))) > 0.6)
    return attached


def objective_of(attached, **options):
    return Objective(attached.model, attached.terms, **options).train()


def loss_of(objective):
    return torch.stack([*objective(BATCH).values()]).sum()


def original(model, name):
    return model.get_submodule(name).parametrizations.weight.original


def own(objective):
    return {part.path: part for part in objective.terms[0].own.parts}


def tensors_of(objective):
    """All tensors, under their names in the authors' code."""
    model = objective.model
    found = {f"{name}.weight": original(model, name) for name in ("conv1", "block.conv1", "block.conv2")}
    for ours, theirs in OF_THE_CODE.items():
        pairs = ((model.get_submodule(ours), "part"), (own(objective)[ours], "full"))
        for module, path in pairs:
            tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            found |= {f"{theirs}_{path}.{name}": tensor for name, tensor in tensors}
    return found


@pytest.mark.parametrize("captured", [False, True])
def test_two_steps_equal_those_of_the_authors_code(captured):
    model = small()
    attached = attached_to(capture(model, BATCH.images) if captured else model)
    objective = objective_of(attached)
    with torch.no_grad():
        for name, tensor in tensors_of(objective).items():
            tensor.copy_(torch.tensor(GOLDEN["before"][name]))
    optimizer = torch.optim.SGD(objective.parameters(), **GOLDEN["optimizer"])
    for step in GOLDEN["steps"]:
        attached._update(step["sparsity"], 0, 0)
        differing = 0
        for name, mask in step["masks"].items():
            ours = weight_mask(model.get_submodule(name.removesuffix(".mask"))).mask
            differing += int((ours != torch.tensor(mask).bool()).sum())
            ours.copy_(torch.tensor(mask).bool())
        assert differing <= 1, "the code also masks what is as large as the threshold"
        losses = objective(BATCH)
        assert sum(losses.values()).item() == pytest.approx(step["loss"], abs=1e-5)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        found = tensors_of(objective)
        assert {name for name, each in found.items() if each.grad is not None} == step["gradients"].keys()
        for name, gradient in step["gradients"].items():
            assert torch.allclose(found[name].grad, torch.tensor(gradient), atol=1e-5), name
        optimizer.step()
    for name, tensor in tensors_of(objective).items():
        assert torch.allclose(tensor, torch.tensor(GOLDEN["after"][name]).to(tensor.dtype), atol=1e-5), name


def dense_loss(objective):
    term = objective.terms[0]
    term.mutual.zero_()
    return term(BATCH, Outputs(torch.zeros(len(BATCH.images), 3), context=objective.context), None)


@torch.no_grad()
def copied(model):
    return {name: original(model, name).grad.clone() for name in ("conv1", "block.conv1", "block.conv2")}


@pytest.mark.parametrize("refined", [True, False])
def test_the_refined_gradient_is_bit_identical_to_its_definition(refined):
    """Kept weights get the masked path's gradient, masked ones the dense path's; without it, all get the sum."""
    objective = objective_of(attached_to(model := small(), refined_gradient=refined, mutual=False))
    loss_of(objective).backward()
    found = copied(model)
    paths = []
    for kind in ("masked", "dense"):
        again = objective_of(attached_to(other := small(), refined_gradient=False))
        (dense_loss(again) if kind == "dense" else F.cross_entropy(other(BATCH.images), BATCH.targets)).backward()
        paths.append(copied(other))
    for name, gradient in found.items():
        mask = weight_mask(model.get_submodule(name)).mask
        masked, dense = (path[name] for path in paths)
        assert not torch.allclose(masked, dense, atol=1e-4)
        if refined:
            assert torch.equal(gradient, torch.where(mask, masked, dense))
        else:
            assert torch.allclose(gradient, masked + dense, atol=1e-6)


def test_masked_and_dense_path_have_their_own_statistics_and_heads():
    objective = objective_of(attached_to(model := small()))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(objective).backward()
        optimizer.step()
    assert own(objective).keys() == {"bn1", "block.bn1", "block.bn2", "linear"}
    for path, part in own(objective).items():
        module = model.get_submodule(path)
        assert not torch.allclose(part.weight, module.weight)
        if isinstance(module, nn.BatchNorm2d):
            assert int(part.num_batches_tracked) == int(module.num_batches_tracked) == 3
            assert not torch.allclose(part.running_mean, module.running_mean)
            assert not torch.allclose(part.running_var, module.running_var)
    assert not any("own" in name for name in model.state_dict()), "the artifact never sees them"
    assert any("running_mean" in name for name in objective.terms.state_dict()), "snapshots do"


def test_without_own_norms_both_paths_share_one_set_of_statistics():
    objective = objective_of(attached_to(model := small(), own_norms=False))
    loss_of(objective).backward()
    assert not own(objective)
    assert int(model.bn1.num_batches_tracked) == 2
    assert sum(1 for _ in objective.parameters()) == sum(1 for _ in small().parameters())


def test_a_masked_head_is_shared():
    attached = DCIL(sparsity=0.5, layers=("block", "linear")).attach(small(), AttachContext(steps=10))
    assert own(objective_of(attached)).keys() == {"bn1", "block.bn1", "block.bn2"}


@pytest.mark.parametrize("mutual", [True, False])
def test_both_paths_learn_from_each_other_after_the_warmup(mutual):
    attached = attached_to(small(), steps=10, warmup=0.3, mutual=mutual)
    objective = objective_of(attached)
    seen = []
    for step in range(6):
        losses = objective(BATCH)
        with torch.no_grad(), masks_and_quantizers_disabled(attached.model):
            dense = objective.terms[0].own.dense_outputs(attached.model, BATCH.images)
        seen.append(float(losses["dcil"].detach() - F.cross_entropy(dense, BATCH.targets)))
        attached.after_step(step, torch.optim.SGD(objective.parameters(), lr=0.1))
    assert seen[:3] == pytest.approx([0, 0, 0], abs=1e-5)
    assert (min(seen[3:]) > 1e-3) is mutual
    assert max(map(abs, seen[3:])) < 1e-5 or mutual


def test_mutual_loss_equals_a_slow_implementation():
    first, second = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    slow = 0.0
    for one, other in zip(first, second, strict=True):
        p, q = (torch.exp(row / 2) / torch.exp(row / 2).sum() for row in (one, other))
        slow += 4 * sum(float(a * (a / b).log() + b * (b / a).log()) for a, b in zip(p, q, strict=True)) / 5
    assert float(mutual_loss(first, second)) == pytest.approx(slow)


def trained(methods, teacher=None, accumulate=1, **options):
    """The attachment and the result of eight training steps."""
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 3, 6, 6, generator=draw), torch.arange(32) % 3
    batches = Given([Batch(images[start : start + 8], labels[start : start + 8]) for start in range(0, 32, 8)])
    attached = chain(methods, small(), AttachContext(data=[images], teacher=teacher, steps=8))
    attached.begin()
    training = Training(batch_size=8, accumulate=accumulate, optimizer={"learning_rate": 0.02}, **options)
    fitted = fit(attached, batches, training, steps=8, teacher=teacher)
    attached.finish()
    return attached, fitted


class Given(list):
    def set_epoch(self, epoch):
        pass


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_dcil_works_with_a_teacher_autocast_and_accumulation(precision, accumulate):
    methods = [SoftTargets(), DCIL(sparsity=0.7, every=2, end=0.5)]
    attached, fitted = trained(methods, teacher=small(1).eval(), accumulate=accumulate, precision=precision)
    assert fitted.precision == precision
    assert fitted.losses.keys() == {"labels", "soft_targets", "dcil"}
    masks = [weight_mask(attached.model.get_submodule(name)) for name in ("conv1", "block.conv1", "block.conv2")]
    count = sum(mask.mask.numel() for mask in masks)
    assert sum(int((~mask.mask).sum()) for mask in masks) == round(0.7 * count)
    assert {mask.gradient for mask in masks} == {"masked"}


def test_the_dense_path_is_not_quantized():
    attached, _ = trained([DCIL(sparsity=0.7, every=2), QAT(bits=2)])
    model = attached.model
    quantizers = [each for each in model.modules() if isinstance(each, FakeQuantize)]
    assert all(each.enabled for each in quantizers)
    conv = model.get_submodule("block.conv1")
    with masks_and_quantizers_disabled(model):
        assert torch.equal(conv.weight, conv.parametrizations.weight.original)
    assert all(each.enabled for each in quantizers)
    assert len(conv.weight[0].unique()) <= 4


def test_invalid_settings_raise():
    with pytest.raises(InputError, match="0 steps"):
        DCIL().attach(small(), AttachContext())
    with pytest.raises(InputError, match="floor"):
        DCIL(sparsity=0.9, floor=0.2).attach(small(), AttachContext(steps=5))
    with pytest.raises(InputError, match="the images have none"):
        objective_of(attached_to(small()))(Batch(BATCH.images))
    assert type(DCIL(sparsity=0.0).attach(small(), AttachContext(steps=5))) is Attachment
