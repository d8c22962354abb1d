"""Removal equals masking: what is cut gives the answers of the network whose channels are zero."""

import copy

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.graph.capture import capture
from tersor.graph.channels import Cut, coupled_channels, merged, remove
from tersor.zoo import build


def captured(name, size):
    torch.manual_seed(0)
    graph = capture(build(name, 10).eval())
    for module in graph.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.normal_(1, 0.2)
            module.bias.data.normal_(0, 0.1)
    return graph, torch.randn(2, 3, size, size)


def masked(graph, cuts):
    """The same network whose channels are zero: filters, biases and norms at 0, shapes as they were."""
    network = copy.deepcopy(graph)
    for cut in cuts:
        module = network.get_submodule(cut.layer)
        for key, tensor in module.named_parameters():
            if cut.axis == "out":
                tensor.data[list(cut.channels)] = 0
            elif key == "weight":
                tensor.data[:, list(cut.channels)] = 0
    return network


def check(name, size):
    graph, images = captured(name, size)
    before = graph(images)
    groups, whole = coupled_channels(graph, images)
    assert torch.equal(graph(images), before), "trying leaves no trace"
    assert groups
    parameters = {key: id(parameter) for key, parameter in graph.named_parameters()}
    cuts = merged(cut for group in groups for cut in group.cuts(range(1, len(group.slices), 2)))
    expected = masked(graph, cuts)(images)
    remove(graph, cuts)
    assert sum(parameter.numel() for parameter in graph.parameters()) < 0.95 * sum(
        parameter.numel() for parameter in masked(capture(build(name, 10)), []).parameters()
    )
    assert {key: id(parameter) for key, parameter in graph.named_parameters()} == parameters
    found = graph(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    return graph, whole


@pytest.mark.parametrize(("name", "size"), [("resnet20", 16), ("mobilenet_v3_small", 64), ("squeezenet1_1", 64)])
def test_what_is_cut_is_what_was_masked(name, size):
    check(name, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("resnet32", "resnet44", "resnet56", "resnet110", "resnet18", "resnet50", "mobilenet_v2", "alexnet"),
        *("vgg11_bn", "densenet121", "efficientnet_b0", "mnasnet0_5", "regnet_y_400mf", "googlenet"),
        *("resnext50_32x4d", "wide_resnet50_2"),
    ],
)
def test_what_is_cut_is_what_was_masked_everywhere(name):
    check(name, 32 if name in {"resnet32", "resnet44", "resnet56", "resnet110"} else 224)


def test_option_a_keeps_the_residual_stream_whole():
    graph, whole = check("resnet20", 16)
    assert set(whole) == {"conv1", "linear"}
    assert "at zero" in whole["conv1"]
    assert whole["linear"] == "its channels are the answers"
    assert graph.get_submodule("layer1.0.conv2").out_channels == 16
    assert graph.get_submodule("layer1.0.conv1").out_channels == 8


def test_cuts_replay_on_a_fresh_capture():
    graph, _ = check("resnet20", 16)
    fresh = capture(build("resnet20", 10).eval())
    remove(fresh, [Cut(layer, axis, tuple(places)) for layer, axis, places in graph.meta["cuts"]])
    fresh.load_state_dict(graph.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fresh(images), graph(images))


def test_a_network_that_cannot_be_followed_is_told():
    with pytest.raises(InputError, match=r"cannot be followed.*weight_pruning"):
        coupled_channels(*captured("shufflenet_v2_x0_5", 64))
