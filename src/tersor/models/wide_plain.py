"""Networks of few and wide layers, whose shapes suit the multiply units of processors.

Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024 (arXiv 2404.00498): seven convolutions without
shortcuts. Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021: plain 3x3 convolutions are the
fastest layers per multiplication.

A stem, then three stages of two 3x3 convolutions with a max pooling after the first one, a global max pooling and a
linear layer. With base width w, the stages have w, 4w and 4w channels. All widths are multiples of 8. The stem of
`wide_plain_W` is a convolution at full resolution, for images of about 32 pixels; that of `wide_plain_large_W` has two
convolutions of stride 2 before it, for larger images. Differences from Jordan's network: the stem is learned and not a
whitening, ReLU replaces GELU, which integer kernels lack, and the base width is a parameter.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (8, 16, 24, 32, 48, 64, 96)
WIDE_PLAIN = {
    f"wide_plain{'_large' if large else ''}_{width}": (width, large) for large in (False, True) for width in WIDTHS
}
_STEM = 24


class _Layer(nn.Module):
    """Convolution, max pooling if `pool`, BatchNorm and ReLU."""

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride), halved again by the pooling."""
        x = F.relu(self.bn(self.conv(x)))
        return F.max_pool2d(x, 2) if self.pool else x


class WidePlain(nn.Module):
    """The network.

    Args:
        width: base width.
        large: whether the stem quarters the image.
        num_classes: number of logits.
        channels: number of image channels.
    """

    def __init__(self, width: int, large: bool, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        downscaling = [_Layer(channels, _STEM, stride=2), _Layer(_STEM, _STEM, stride=2)] if large else []
        self.stem = nn.Sequential(*downscaling, _Layer(_STEM if large else channels, _STEM))
        self.stage1 = _stage(_STEM, width)
        self.stage2 = _stage(width, 4 * width)
        self.stage3 = _stage(4 * width, 4 * width)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W), at least 8 pixels (32 with a large stem) -> logits (N, num_classes)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.linear(x.amax(dim=(2, 3)))


def _stage(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(_Layer(in_channels, channels, pool=True), _Layer(channels, channels))
