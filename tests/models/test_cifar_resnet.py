from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tersor.graph.capture import capture
from tersor.models.cifar_resnet import DEPTHS, Block, CifarResNet


@pytest.mark.parametrize(
    ("depth", "parameters"), zip(DEPTHS, (269_722, 464_154, 658_586, 853_018, 1_727_962), strict=True)
)
def test_parameter_counts_are_the_published_ones(depth, parameters):
    with torch.device("meta"):
        model = CifarResNet(depth)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 8)])
def test_a_downsampling_block_equals_a_slow_implementation(size):
    torch.manual_seed(0)
    block = Block(4, 10, stride=2).eval()
    x = torch.randn(2, 4, *size)
    main = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    expected = main.clone()
    for row in range(expected.shape[2]):
        for column in range(expected.shape[3]):
            expected[:, 3:7, row, column] += x[:, :, 2 * row, 2 * column]
    assert torch.equal(block(x), expected.clamp(min=0))


def test_a_block_that_keeps_its_shape_adds_its_input():
    block = Block(4, 4, stride=1).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x), x.clamp(min=0))


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (45, 64)])
def test_images_can_have_any_size(size):
    model = CifarResNet(20, num_classes=7)
    assert model(torch.randn(2, 3, *size)).shape == (2, 7)


def test_the_network_can_be_captured_and_keeps_its_keys():
    model = CifarResNet(20).eval()
    x = torch.randn(1, 3, 24, 24)
    captured = capture(model, x)
    assert torch.equal(captured(x), model(x))
    assert list(captured.state_dict()) == list(model.state_dict())
