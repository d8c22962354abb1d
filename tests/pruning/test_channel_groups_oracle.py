"""For networks that torch-pruning supports, its groups equal ours."""

import warnings
from collections import defaultdict

import pytest
import torch
import torchvision
from torch import nn

from tersor.graph.capture import capture
from tersor.pruning.channel_groups import coupled_channels

tp = pytest.importorskip("torch_pruning")


def hands_on(module):
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels and module.groups > 1
    return not isinstance(module, nn.Linear)


def theirs(model, images):
    """For every channel of every group, the set of (layer, axis, index) removed with it."""
    names = {module: name for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tp.DependencyGraph().build_dependency(model, example_inputs=images, verbose=False)
        channels = set()
        for group in found.get_all_groups():
            places = defaultdict(set)
            for member in group:
                module = member.dep.target.module
                if module not in names:
                    continue
                reads = "in_channels" in member.dep.handler.__name__ and not hands_on(module)
                for channel, place in zip(member.root_idxs, member.idxs, strict=True):
                    places[channel].add((names[module], "in" if reads else "out", place))
            channels |= {frozenset(each) for each in places.values()}
    return channels


def ours(model, images):
    groups, whole = coupled_channels(capture(model, images), images)
    assert len(whole) == 1, "the answers"
    return {
        frozenset((cut.layer, cut.axis, place) for cut in unit if "=" not in cut.axis for place in cut.channels)
        for group in groups
        for unit in group.slices
    }


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("densenet121", "mobilenet_v2", "vgg11_bn")),
    ],
)
def test_the_groups_equal_those_of_torch_pruning(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    found = ours(model, images)
    of_the_output = {each for each in theirs(model, images) if each not in found}
    assert len(of_the_output) == 10
    assert len(found) > 1000
