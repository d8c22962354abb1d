import copy

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.method import chain
from tersor.core.parametrization import strip, weight_mask
from tersor.measure import costs
from tersor.methods.ptq import PTQ
from tersor.methods.weight_pruning import WeightPruning
from tersor.zoo import build

IMAGES = torch.rand(4, 3, 16, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("resnet20", 10).eval()


def pruned(model, steps=0, **options):
    attached = WeightPruning(**options).attach(model, steps=steps)
    for _ in attached.begin():
        pass
    return attached


def test_one_shot_masks_the_smallest_weights_of_each_layer(model):
    before = copy.deepcopy(model)
    pruned(model, sparsity=0.7)
    for name, layer in before.named_modules():
        if isinstance(layer, nn.Conv2d):
            shown = model.get_submodule(name).weight.detach()
            count = layer.weight.numel()
            threshold = layer.weight.abs().flatten().kthvalue(round(0.7 * count)).values
            assert torch.equal(shown, torch.where(layer.weight.abs() > threshold, layer.weight, torch.zeros(())))
    assert torch.equal(model.linear.weight, before.linear.weight)


def test_global_scope_is_exact_over_the_network_and_uneven_over_layers(model):
    pruned(model, sparsity=0.9, scope="global")
    found = costs(model, IMAGES[:1])
    convolutions = [layer for layer in found.layers if layer.kind == "Conv2d"]
    weights = sum(torch.Size(layer.weight_shape).numel() for layer in convolutions)
    assert found.sparsity == round(0.9 * weights) / weights
    assert max(layer.sparsity for layer in convolutions) - min(layer.sparsity for layer in convolutions) > 0.1


def test_random_is_reproducible_and_not_magnitude(model):
    first, again, other = (copy.deepcopy(model) for _ in range(3))
    pruned(first, importance="random")
    pruned(again, importance="random")
    pruned(other, importance="random", seed=1)
    assert torch.equal(weight_mask(first.conv1).mask, weight_mask(again.conv1).mask)
    assert not torch.equal(weight_mask(first.conv1).mask, weight_mask(other.conv1).mask)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_a_schedule_rises_and_ends_exactly_however_few_the_steps(model, steps, shape):
    attached = pruned(model, steps=steps, sparsity=0.8, sparsity_schedule=shape, every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = attached.bind(optimizer)
    seen = []
    for _ in range(steps):
        model(IMAGES).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(1 - weight_mask(model.layer1[0].conv1).mask.float().mean().item())
    handle.remove()
    attached.finish()
    assert seen == sorted(seen)
    mask = weight_mask(model.layer1[0].conv1).mask
    assert int((~mask).sum()) == round(0.8 * mask.numel())
    if steps == 40:
        assert seen[2] < 0.8 * (0.4 if shape == "cubic" else 0.2)
        assert seen[-1] == pytest.approx(0.8, abs=1e-2)


def test_a_masked_weight_gets_no_gradient_and_stays_masked(model):
    attached = pruned(model, sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    original = model.conv1.parametrizations.weight.original
    masked = ~weight_mask(model.conv1).mask
    before = original.detach().clone()
    handle = attached.bind(optimizer)
    model(IMAGES).square().mean().backward()
    optimizer.step()
    handle.remove()
    assert torch.equal(original[masked], before[masked])
    assert not torch.equal(original, before)
    attached.finish()
    assert torch.equal(~weight_mask(model.conv1).mask, masked)


def test_repeated_at_a_rising_sparsity_masks_are_nested_and_one(model):
    pruned(model, sparsity=0.5)
    first = weight_mask(model.conv1).mask.clone()
    pruned(model, sparsity=0.75)
    second = weight_mask(model.conv1).mask
    assert len(model.conv1.parametrizations.weight) == 1
    assert not (second & ~first).any()
    assert int((~second).sum()) == round(0.75 * second.numel())


def test_zeros_stay_zeros_under_a_grid(model):
    attached = chain([WeightPruning(sparsity=0.6), PTQ(bits=4)], model, data=[IMAGES])
    for _ in attached.begin():
        pass
    quantized = attached.model.get_submodule("layer2.0.conv1").weight.detach()
    assert (quantized == 0).float().mean() >= 0.6
    assert torch.equal(strip(attached.model)(IMAGES), attached.model(IMAGES))


def test_layers_may_be_named(model):
    pruned(model, sparsity=0.5, layers=("linear", "layer3.*.conv2"))
    masked = [name for name, layer in model.named_modules() if weight_mask(layer) is not None]
    assert masked == ["layer3.0.conv2", "layer3.1.conv2", "layer3.2.conv2", "linear"]


def test_mistakes_are_told(model):
    with pytest.raises(InputError, match="matches no layer"):
        WeightPruning(layers=("nothing",)).attach(model)
    with pytest.raises(InputError, match="rises over the steps"):
        WeightPruning(sparsity_schedule="cubic").attach(model)
    pruned(model, sparsity=0.5)
    with pytest.raises(InputError, match="sparse already"):
        WeightPruning(sparsity=0.4).attach(model)
    quantized = PTQ().attach(build("resnet20", 10), data=[IMAGES]).model
    with pytest.raises(InputError, match="masks lie under grids"):
        WeightPruning().attach(quantized)
