import copy

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.evaluation.costs import costs
from tersor.graph.parametrization import strip
from tersor.methods.ptq import PTQ
from tersor.methods.weight_pruning import WeightPruning
from tersor.models import build
from tersor.pruning.mask import weight_mask
from tersor.training.context import AttachContext
from tersor.training.method import chain

IMAGES = torch.rand(4, 3, 16, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("resnet20", 10).eval()


def pruned(model, steps=0, **options):
    attached = WeightPruning(**options).attach(model, AttachContext(steps=steps))
    attached.begin()
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


def test_global_scope_reaches_the_exact_sparsity_with_different_sparsities_per_layer(model):
    pruned(model, sparsity=0.9, scope="global")
    found = costs(model, IMAGES[:1])
    convolutions = [layer for layer in found.layers if layer.kind == "Conv2d"]
    weights = sum(torch.Size(layer.weight_shape).numel() for layer in convolutions)
    assert found.sparsity == round(0.9 * weights) / weights
    assert max(layer.sparsity for layer in convolutions) - min(layer.sparsity for layer in convolutions) > 0.1


def test_random_importance_is_reproducible_and_depends_on_the_seed(model):
    first, again, other = (copy.deepcopy(model) for _ in range(3))
    pruned(first, importance="random")
    pruned(again, importance="random")
    pruned(other, importance="random", seed=1)
    assert torch.equal(weight_mask(first.conv1).mask, weight_mask(again.conv1).mask)
    assert not torch.equal(weight_mask(first.conv1).mask, weight_mask(other.conv1).mask)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_a_schedule_is_monotonic_and_exact_at_the_end_for_any_number_of_steps(model, steps, shape):
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


def test_pruning_again_at_a_higher_sparsity_nests_the_masks(model):
    pruned(model, sparsity=0.5)
    first = weight_mask(model.conv1).mask.clone()
    pruned(model, sparsity=0.75)
    second = weight_mask(model.conv1).mask
    assert len(model.conv1.parametrizations.weight) == 1
    assert not (second & ~first).any()
    assert int((~second).sum()) == round(0.75 * second.numel())


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ({"sparsity": 0.4}, {"sparsity": 0.6, "granularity": "filter"}),
        ({"sparsity": 0.4}, {"sparsity": 0.6, "granularity": "kernel", "scope": "global", "floor": 0.2}),
        ({"sparsity": 0.6}, {"granularity": "2:4"}),
        ({"sparsity": 0.4, "granularity": "filter"}, {"granularity": "2:4"}),
        ({"sparsity": 0.6, "layers": ("layer3*",)}, {"sparsity": 0.5}),
        ({"sparsity": 0.5, "scope": "global"}, {"sparsity": 0.55}),
        ({"sparsity": 0.5, "scope": "global"}, {"sparsity": 0.6, "scope": "global", "floor": 0.35}),
    ],
)
def test_nothing_comes_back_whatever_is_masked_later(model, before, behind):
    pruned(model, **before)
    first = {name: mask.clone() for name, mask in masks_of(model).items()}
    attached = pruned(model, **behind)
    second = masks_of(model)
    assert not any((second[name] & ~mask).any() for name, mask in first.items() if name in attached.masked)
    assert attached.sparsity >= attached.method.target - 1e-3
    if "floor" in behind and "granularity" not in behind:
        assert attached.sparsity == pytest.approx(behind["sparsity"], abs=1e-3), "a floor takes no place of others"


def test_masked_weights_stay_zero_when_quantized(model):
    attached = chain([WeightPruning(sparsity=0.6), PTQ(bits=4)], model, AttachContext(data=[IMAGES]))
    attached.begin()
    quantized = attached.model.get_submodule("layer2.0.conv1").weight.detach()
    assert (quantized == 0).float().mean() >= 0.6
    assert torch.equal(strip(attached.model)(IMAGES), attached.model(IMAGES))


def test_layers_can_be_selected_by_name(model):
    pruned(model, sparsity=0.5, layers=("linear", "layer3.*.conv2"))
    masked = [name for name, layer in model.named_modules() if weight_mask(layer) is not None]
    assert masked == ["layer3.0.conv2", "layer3.1.conv2", "layer3.2.conv2", "linear"]


def test_invalid_settings_raise(model):
    with pytest.raises(InputError, match="matches no layer"):
        WeightPruning(layers=("nothing",)).attach(model, AttachContext())
    with pytest.raises(InputError, match="raises the sparsity during training, but the stage has 0 steps"):
        WeightPruning(sparsity_schedule="cubic").attach(model, AttachContext())
    pruned(model, sparsity=0.5)
    with pytest.raises(InputError, match=r"already has a sparsity of"):
        WeightPruning(sparsity=0.4).attach(model, AttachContext())
    quantized = PTQ().attach(build("resnet20", 10), AttachContext(data=[IMAGES])).model
    with pytest.raises(InputError, match="masks come before quantizers"):
        WeightPruning().attach(quantized, AttachContext())


DATA = [(torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(place)), torch.arange(8)) for place in (0, 1)]


def third_power(progress):
    return progress**3


def too_far(progress):
    return 2.0 * progress


def first_filters(weight):
    return -torch.arange(len(weight), dtype=torch.float)


def masks_of(model):
    found = {name: weight_mask(layer) for name, layer in model.named_modules()}
    return {name: mask.mask for name, mask in found.items() if mask is not None}


@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter"])
@pytest.mark.parametrize("importance", ["magnitude", "magnitude_l2", "taylor", "batchnorm", "fpgm", "random", "own"])
def test_every_importance_masks_as_much_and_others(model, importance, granularity):
    path = f"{__name__}:first_filters" if importance == "own" else importance
    options = {"importance": path, "granularity": granularity, "scope": "global", "sparsity": 0.5}
    of_filters = importance in ("batchnorm", "fpgm")
    if (of_filters or importance == "own") and granularity != "filter":
        with pytest.raises(InputError, match=r"(granularity: filter|Return a tensor)"):
            WeightPruning(**options).attach(model, AttachContext(data=DATA)).begin()
        return
    if importance == "magnitude_l2" and granularity == "weight":
        with pytest.raises(InputError, match="Write importance: magnitude"):
            WeightPruning(**options).attach(model, AttachContext())
        return
    with torch.no_grad():
        for place, norm in enumerate(each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=torch.Generator().manual_seed(place)))
    plain = copy.deepcopy(model)
    WeightPruning(**options).attach(model, AttachContext(data=DATA)).begin()
    masks = masks_of(model)
    total, masked = sum(mask.numel() for mask in masks.values()), sum(int((~mask).sum()) for mask in masks.values())
    assert 0 <= masked - round(0.5 * total) < (1 if granularity == "weight" else 9 if granularity == "kernel" else 577)
    if importance == "batchnorm":
        dead = ~masks["layer1.0.conv1"].flatten(1).any(1)
        gamma = plain.layer1[0].bn1.weight
        assert not dead.any() or gamma[dead].max() < gamma[~dead].min()
        assert sum(int((~mask.flatten(1).any(1)).sum()) for mask in masks.values()) > 100
    elif importance not in ("magnitude", "magnitude_l2"):
        pruned(plain, sparsity=0.5, granularity=granularity, scope="global")
        assert any(not torch.equal(masks_of(plain)[name], mask) for name, mask in masks.items())


def test_n_of_m_masks_keep_n_of_every_m_input_channels(model):
    attached = pruned(model, granularity="2:4")
    (note,) = attached.notes
    assert note == "these layers are not masked, because their number of input channels is not a multiple of 4: conv1"
    for mask in masks_of(model).values():
        groups = mask.movedim(1, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()
    assert weight_mask(model.conv1) is None
    pruned(model, granularity="1:4")
    assert all((mask.movedim(1, -1).reshape(-1, 4).sum(1) == 1).all() for mask in masks_of(model).values())


def test_with_a_schedule_n_of_m_masks_keep_fewer_weights_step_by_step(model):
    attached = pruned(model, steps=8, granularity="2:8", sparsity_schedule="linear", every=1, end=1.0)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.0), []
    for step in range(8):
        attached.after_step(step, optimizer)
        (stay,) = masks_of(model)["layer1.0.conv1"].movedim(1, -1).reshape(-1, 8).sum(1).unique().tolist()
        seen.append(stay)
    assert (seen[0], seen[-1]) == (7, 2)
    assert seen == sorted(seen, reverse=True)


def test_a_floor_keeps_weights_in_every_layer_under_a_global_threshold(model):
    with torch.no_grad():
        model.layer2[1].conv1.weight.mul_(1e-3)
    one, some = copy.deepcopy(model), copy.deepcopy(model)
    pruned(one, sparsity=0.9, scope="global")
    pruned(some, sparsity=0.9, scope="global", floor=0.05)
    assert int(masks_of(one)["layer2.1.conv1"].sum()) == 1
    assert int(masks_of(some)["layer2.1.conv1"].sum()) == 461  # of 9,216
    count = [sum(int(mask.sum()) for mask in masks_of(each).values()) for each in (one, some)]
    assert count[0] == count[1]


def test_a_users_schedule_is_followed(model):
    attached = pruned(model, steps=10, sparsity=0.8, sparsity_schedule=f"{__name__}:third_power", every=1, end=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(10):
        attached.after_step(step, optimizer)
        assert attached.sparsity == pytest.approx(0.8 * ((step + 1) / 10) ** 3, abs=1e-3)
    [masks] = attached.metrics["masks"]
    assert masks["steps"] == list(range(1, 11))
    assert sum(masks["changed"]) == pytest.approx(0.8, abs=1e-3), "nested masks change once"
    with pytest.raises(InputError, match=r"returned 1\.5 at progress 0\.75\. Return a number from 0 to 1"):
        WeightPruning(sparsity_schedule=f"{__name__}:too_far").attach(build("resnet20", 10), AttachContext(steps=16))


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.9, "floor": 0.1, "scope": "global"},
        {"sparsity": 0.8, "floor": 0.2, "scope": "global"},
        {"sparsity": 1 / 3, "granularity": "2:3", "layers": ("conv1",)},
    ],
)
def test_a_sparsity_at_the_limit_of_the_floor_is_accepted(model, options):
    assert pruned(model, **options).sparsity == pytest.approx(options["sparsity"], abs=0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "1:4", "sparsity": 0.5}, "fixes the sparsity at 0.75, but sparsity is 0.5. Leave out"),
        ({"granularity": "2:4", "scope": "global"}, "Leave out scope: global"),
        ({"granularity": "2:7"}, "whose number of input channels is a multiple of 7"),
        ({"floor": 0.1}, "Write scope: global"),
        ({"floor": 0.6, "scope": "global"}, "allows a sparsity of 0.4 at most"),
        ({"importance": "taylor"}, "there is no data"),
        ({"importance": "nowhere:function"}, "there is no module 'nowhere'"),
        ({"sparsity_schedule": "nowhere:function"}, "there is no module 'nowhere'"),
        ({"importance": "batchnorm", "granularity": "filter"}, "batchnorm needs images to run the network on"),
    ],
)
def test_contradictory_options_and_options_without_effect_raise(model, options, words):
    with pytest.raises(InputError, match=words):
        WeightPruning(**options).attach(model, AttachContext(steps=10))
    assert not masks_of(model), "no masks were inserted"


def test_a_layer_without_a_batchnorm_after_it_raises(model):
    method = WeightPruning(importance="batchnorm", granularity="filter", layers=("linear",))
    with pytest.raises(InputError, match="with a scale after linear"):
        method.attach(model, AttachContext(data=[IMAGES]))
    assert not masks_of(model), "no masks were inserted"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance": "magnitudes"}, "unknown importance 'magnitudes'. Did you mean 'magnitude'"),
        ({"sparsity_schedule": "cubik"}, "Did you mean 'cubic'"),
        ({"granularity": "4:2"}, "N:M such as 2:4"),
    ],
)
def test_unknown_names_raise(options, words):
    with pytest.raises(InputError, match=words):
        WeightPruning(**options)
