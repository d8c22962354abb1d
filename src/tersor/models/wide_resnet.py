"""Wider networks for small images, the usual teachers in papers on distillation.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016: `wrn_16_2` has depth 16 = 6n + 4 and k = 2 times 16, 32
and 64 channels; BatchNorm and ReLU come before each convolution, and once more at the end.

Tian et al., "Contrastive Representation Distillation", ICLR 2020: `resnet32x4` is a ResNet of depth 6n + 2 with 32
channels first and 64, 128 and 256 in its stages; its shortcuts are 1x1 convolutions with BatchNorm (option B).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDE_RESNETS = {f"wrn_{depth}_{k}": (depth, k) for depth in (16, 28, 40) for k in (1, 2, 4, 10)}
FOURFOLD_RESNETS = {f"resnet{depth}x4": depth for depth in (8, 32)}


class PreActivationBlock(nn.Module):
    """Twice BatchNorm, ReLU, convolution; the shortcut starts after the first ReLU where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride > 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride), rounded up."""
        first = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(first)
        return self.conv2(F.relu(self.bn2(self.conv1(first)))) + shortcut


class WideResNet(nn.Module):
    """A Wide ResNet; `layer1` to `layer3` return the sums before the next BatchNorm."""

    def __init__(self, depth: int, k: int, num_classes: int = 10) -> None:
        super().__init__()
        assert depth % 6 == 4, "three stages of n blocks with two convolutions each, and four layers around them"
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(PreActivationBlock, 16, 16 * k, blocks, stride=1)
        self.layer2 = _stage(PreActivationBlock, 16 * k, 32 * k, blocks, stride=2)
        self.layer3 = _stage(PreActivationBlock, 32 * k, 64 * k, blocks, stride=2)
        self.bn = nn.BatchNorm2d(64 * k)
        self.linear = nn.Linear(64 * k, num_classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.relu(self.bn(x)).mean(dim=(2, 3)))


class ConvolutionShortcutBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = None
        if stride > 1 or in_channels != channels:
            convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride), rounded up."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class FourfoldResNet(nn.Module):
    """A ResNet with four times the channels of He et al.'s."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        assert depth % 6 == 2, "three stages of n blocks with two convolutions each, and two layers around them"
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = _stage(ConvolutionShortcutBlock, 32, 64, blocks, stride=1)
        self.layer2 = _stage(ConvolutionShortcutBlock, 64, 128, blocks, stride=2)
        self.layer3 = _stage(ConvolutionShortcutBlock, 128, 256, blocks, stride=2)
        self.linear = nn.Linear(256, num_classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(
    kind: type[PreActivationBlock | ConvolutionShortcutBlock], in_channels: int, channels: int, blocks: int, stride: int
) -> nn.Sequential:
    first = kind(in_channels, channels, stride)
    return nn.Sequential(first, *(kind(channels, channels, 1) for _ in range(blocks - 1)))


def _kaiming(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
