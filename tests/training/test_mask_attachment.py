"""The exact gradient of masked weights, and the reported values of changing masks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import CompressionWarning, InputError
from tersor.methods.dcil import DCIL
from tersor.methods.dpf import DPF
from tersor.methods.weight_pruning import WeightPruning
from tersor.pruning.dense_path import masks_and_quantizers_disabled
from tersor.pruning.mask import Mask
from tersor.training.context import AttachContext
from tersor.training.dynamic_masks import DynamicMasks
from tersor.training.mask_attachment import MaskedAttachment, dense_weight, insert_masks, mask_of
from tersor.training.mask_log import MAX_ROWS, MaskLog, log_interval
from tersor.training.method import chain

IMAGES, LABELS = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 3))


def masked(gradient):
    model = network()
    layers = {"0": model[0], "2": model[2]}
    insert_masks(layers, gradient, "a method")
    for layer in layers.values():
        mask_of(layer).mask.copy_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(2)) > 0.7)
    return model, MaskedAttachment(model, layers)


def shown_gradients(model):
    """The gradients of the masked weights, computed with a network without masks."""
    plain = network()
    with torch.no_grad():
        for place in (0, 2):
            plain[place].weight.copy_(model[place].weight)
    F.cross_entropy(plain(IMAGES), LABELS).backward()
    return {place: plain[place].weight.grad for place in (0, 2)}


@pytest.mark.parametrize("gradient", ["masked", "straight_through", "split"])
def test_masked_weights_and_their_gradients(gradient):
    model, _ = masked(gradient)
    for place in (0, 2):
        mask, dense = mask_of(model[place]).mask, dense_weight(model[place])
        assert torch.equal(model[place].weight, torch.where(mask, dense, torch.zeros(())))
    F.cross_entropy(model(IMAGES), LABELS).backward()
    for place, wanted in shown_gradients(model).items():
        mask, found = mask_of(model[place]).mask, dense_weight(model[place]).grad
        assert wanted[~mask].abs().max() > 0
        assert torch.equal(found, wanted if gradient == "straight_through" else wanted * mask)


@pytest.mark.parametrize("gradient", ["masked", "straight_through", "split"])
def test_dense_weights_and_their_gradients(gradient):
    model, _ = masked(gradient)
    factor = torch.randn(4, 3, 3, 3)
    with masks_and_quantizers_disabled(model):
        assert torch.equal(model[0].weight, dense_weight(model[0]))
        (model[0].weight * factor).sum().backward()
    mask = mask_of(model[0]).mask
    assert torch.equal(dense_weight(model[0]).grad, factor * ~mask if gradient == "split" else factor)
    assert torch.equal(model[0].weight[~mask], torch.zeros(int((~mask).sum())))


def optimizers(model):
    return {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        "adamw": torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
    }


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_with_the_masked_gradient_masked_weights_do_not_move(name):
    """Also if momentum was accumulated before a weight was masked; the other weights move as without masks."""
    model, attached = masked("masked")
    masks = {place: mask_of(model[place]).mask for place in (0, 2)}
    later = {place: mask.clone() for place, mask in masks.items()}
    optimizer = optimizers(model)[name]
    attached.bind(optimizer)
    for mask in masks.values():
        mask.fill_(value=True)
    for _ in range(2):
        step(model, optimizer)
    for place, mask in masks.items():
        mask.copy_(later[place])
    before = {place: dense_weight(model[place]).detach().clone() for place in masks}
    free = copy.deepcopy(model)
    other = optimizers(free)[name]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(free, other)
    step(model, optimizer)
    for place, mask in masks.items():
        moved = dense_weight(free[place])
        assert torch.equal(dense_weight(model[place])[mask], moved[mask])
        assert not torch.equal(moved[~mask], before[place][~mask]), "without help, it moves"
    for _ in range(3):
        step(model, optimizer)
    for place, mask in masks.items():
        assert torch.equal(dense_weight(model[place])[~mask], before[place][~mask])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_with_the_straight_through_gradient_dense_weights_are_trained(name):
    """The gradient of the masked weights is applied to all weights, and weight decay too."""
    model, attached = masked("straight_through")
    optimizer = optimizers(model)[name]
    attached.bind(optimizer)
    twins = {place: nn.Parameter(dense_weight(model[place]).detach().clone()) for place in (0, 2)}
    same = optimizers(nn.ParameterList(twins.values()))[name]
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        for place, twin in twins.items():
            twin.grad = dense_weight(model[place]).grad.clone()
        optimizer.step()
        same.step()
        for place, twin in twins.items():
            assert torch.equal(dense_weight(model[place]), twin)


@pytest.mark.parametrize("method", [WeightPruning(sparsity_schedule="linear"), DPF(), DCIL()], ids=type)
def test_the_structure_contains_the_gradient_mode(method):
    attached = method.attach(network(), AttachContext(steps=10))
    found = structure(attached.model)
    again = rebuild(network(), found)
    again.load_state_dict(attached.model.state_dict())
    assert structure(again) == found
    wanted = {WeightPruning: "masked", DPF: "straight_through", DCIL: "split"}[type(method)]
    assert [mask_of(again[place]).gradient for place in (0, 2)] == [wanted, wanted]
    attached.finish()
    assert {each["gradient"] for log in structure(attached.model)["weights"].values() for each in log} == {"masked"}


def test_steps_sparsity_and_changes_of_masks_are_reported():
    model = network()
    layers = {"0": model[0], "2": model[2]}
    insert_masks(layers, "straight_through", "a method")
    attached = DynamicMasks(model, layers, DPF(sparsity=0.5, every=2, end=0.5), steps=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    masks = [torch.cat([mask_of(layer).mask.flatten() for layer in layers.values()]).clone()]
    for step in range(12):
        if step == 9:
            with torch.no_grad():
                dense_weight(model[0]).neg_().reciprocal_()
        attached.before_step(step, optimizer)
        attached.after_step(step, optimizer)
        if step % 2:
            masks.append(torch.cat([mask_of(layer).mask.flatten() for layer in layers.values()]).clone())
    attached.finish()
    [log] = attached.metrics["masks"]
    assert log["steps"] == [2, 4, 6, 8, 10, 12]
    size = len(masks[0])
    assert log["sparsity"] == pytest.approx([int((~mask).sum()) / size for mask in masks[1:]], abs=1e-6)
    assert log["sparsity"] == sorted(log["sparsity"])
    assert log["sparsity"][2:] == [round(round(0.5 * size) / size, 6)] * 4
    changed = [int((old != new).sum()) / size for old, new in itertools.pairwise(masks)]
    assert log["changed"] == pytest.approx(changed, abs=1e-6)
    assert log["changed"][3] == log["changed"][5] == 0
    assert log["changed"][4] > 0.1, "masked weights came back"


def test_a_method_that_never_sets_its_masks_causes_a_warning():
    model = network()
    insert_masks({"0": model[0]}, "masked", "a method")
    attached = MaskedAttachment(model, {"0": model[0]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached.bind(optimizer)
    optimizer.step()
    with pytest.warns(CompressionWarning, match=r"after 1 optimizer steps, and no mask was set.* Call set_masks"):
        attached.finish()


def test_masks_not_set_in_any_step_cause_a_warning():
    model = network()
    insert_masks({"0": model[0]}, "masked", "a method")
    with pytest.warns(CompressionWarning, match=r"after 0 optimizer steps, and no mask was set: the sparsity is 0. In"):
        MaskedAttachment(model, {"0": model[0]}).finish()


def test_the_log_of_a_long_stage_is_thinned():
    log = MaskLog()
    every = log_interval(5000)
    for number in range(5000):
        if number % every == 0:
            log.add(number * 16, 0.5, 0.25)
    log.add(80_000, 0.9, 0.0)
    columns = log.columns
    assert 150 < len(columns["steps"]) <= MAX_ROWS
    assert (columns["steps"][0], columns["steps"][-1]) == (0, 80_000)
    assert columns["sparsity"][-1] == 0.9
    assert log_interval(MAX_ROWS - 2) == 1


def test_a_resumed_chain_has_the_log_of_each_part():
    methods = [DPF(layers=("0",), every=1), WeightPruning(layers=("2",))]
    first = chain(methods, network(), AttachContext(steps=10))
    first.begin()
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.0)
    for step in range(3):
        first.after_step(step, optimizer)
    resumed = chain(methods, network(), AttachContext(steps=10))
    resumed.load_state_dict(first.state_dict())
    assert [log["steps"] for log in resumed.metrics["masks"]] == [[1, 2, 3], [0]]
    assert resumed.metrics == first.metrics
    with pytest.raises(ValueError, match="mask log of shape"):
        resumed.parts[0].load_state_dict({"mask_log": torch.zeros(3)})


def test_two_methods_that_mask_the_same_layer_in_one_stage_raise():
    with pytest.raises(InputError, match="masks 0, which an earlier method"):
        chain([DPF(), WeightPruning()], network(), AttachContext(steps=10))
    apart = chain([DPF(layers=("0",)), WeightPruning(layers=("2",))], network(), AttachContext(steps=10))
    assert [len(part.masked) for part in apart.parts] == [1, 1]
    apart.begin()
    assert [len(log["steps"]) for log in apart.metrics["masks"]] == [0, 1], "each tells of its own"
    model = network()
    chain([WeightPruning(sparsity=0.5)], model, AttachContext())
    chain([DPF(sparsity=0.8)], model, AttachContext(steps=10))
    assert [type(each) for each in model[0].parametrizations.weight] == [Mask]


def test_masked_weights_do_not_move_in_later_stages():
    model = network()
    first = chain([WeightPruning(sparsity=0.5)], model, AttachContext())
    first.begin()
    first.finish()
    before = {place: (mask_of(model[place]).mask.clone(), dense_weight(model[place]).clone()) for place in (0, 2)}
    behind = chain([DPF(sparsity=0.6, layers=("2",))], model, AttachContext(steps=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    behind.bind(optimizer)
    for _ in range(3):
        model(IMAGES).square().mean().backward()
        optimizer.step()
    moved = {place: dense_weight(model[place]) != weight for place, (_, weight) in before.items()}
    assert not moved[0][~before[0][0]].any()
    assert moved[0][before[0][0]].all()
    assert moved[2][~before[2][0]].any(), "dpf moves what it masks"


def test_insert_masks_sets_the_gradient_mode_of_an_existing_mask():
    model = network()
    parametrize.register_parametrization(model[0], "weight", Mask(model[0].weight.shape))
    insert_masks({"0": model[0]}, "split", "a method")
    assert mask_of(model[0]).gradient == "split"


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"1": torch.ones(4, 3, 3, 3, dtype=torch.bool)}, "unknown masked layer '1'.* Possible: 0, 2"),
        ({"0": torch.ones(4, 3, 3, 3)}, r"mask of layer '0' must be bool of shape \(4, 3, 3, 3\), got float32"),
        ({"0": torch.ones(4, dtype=torch.bool)}, r"must be bool of shape \(4, 3, 3, 3\), got bool \(4,\)"),
    ],
)
def test_masks_of_a_wrong_form_raise_and_none_is_set(masks, message):
    _, attached = masked("masked")
    before = attached.sparsity
    with pytest.raises(InputError, match=message):
        attached.set_masks(masks, 1)
    assert attached.sparsity == before


def test_missing_masks_and_an_unknown_gradient_mode_raise():
    model = network()
    with pytest.raises(InputError, match=r"the layer '0' has no mask\. Call insert_masks"):
        MaskedAttachment(model, {"0": model[0]})
    with pytest.raises(InputError, match=r"unknown gradient 'mask'.* Did you mean 'masked'"):
        insert_masks({"0": model[0]}, "mask", "a method")
