"""Small networks that are used by several test files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams

from tersor.models.cifar_resnet import CifarResNet


class Small(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 4, 3, padding=1)
        self.answer = nn.Linear(4, 5)

    def forward(self, images):
        values = F.relu(self.norm(self.first(images)))
        return self.answer(F.relu(self.second(values)).mean((2, 3)))


def resnet8(num_classes: int = 10) -> nn.Module:
    """For recipes, as `toy_networks:resnet8`."""
    return CifarResNet(8, num_classes)


def short(name: str) -> nn.Module:
    """A network for 10 classes with a few narrow blocks of each kind in the network of this name."""
    models = torchvision.models
    if name == "resnet8":
        return resnet8()
    if name == "densenet":
        return models.DenseNet(4, (2, 2, 2, 2), num_init_features=8, bn_size=2, num_classes=10)
    if name == "shufflenet":
        return models.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=10)
    if name == "mobilenet2":
        blocks = [[1, 8, 1, 1], [3, 8, 2, 2], [3, 16, 2, 2]]
        return models.MobileNetV2(10, inverted_residual_setting=blocks)
    if name == "mobilenet3":
        kinds = [(16, 16, 16, True, "RE", 2), (16, 32, 16, False, "RE", 1), (16, 48, 24, True, "HS", 2)]
        blocks = [InvertedResidualConfig(into, 3, *wide, stride, 1, 1.0) for into, *wide, stride in kinds]
        return models.MobileNetV3(blocks, 32, num_classes=10)
    assert name == "regnet_y"
    parameters = BlockParams([1, 2, 1, 1], [8, 8, 16, 16], [4] * 4, [1.0] * 4, [2] * 4, 0.25)
    return models.RegNet(parameters, num_classes=10)


class Swish(torch.autograd.Function):
    """SiLU, with the gradient that autograd would compute."""

    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values * values.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (values,) = ctx.saved_tensors
        share = values.sigmoid()
        return gradient * share * (1 + values * (1 - share))
