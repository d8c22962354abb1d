"""A small UNet: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015.

Three changes: convolutions are padded, so that the output has the size of the image; BatchNorm follows each of them;
the decoder upsamples by nearest neighbors in place of transposed convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Logits of each pixel; height and width are multiples of 8.

    Args:
        num_classes: number of logits.
        width: channels at full resolution; each of three halvings of the image doubles them.
        channels: channels of the images.
    """

    def __init__(self, num_classes: int = 11, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        pairs = zip([channels, *widths], widths, strict=False)
        self.encoder = nn.ModuleList([_convolutions(given, wanted) for given, wanted in pairs])
        steps = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.decoder = nn.ModuleList([_convolutions(below + beside, beside) for below, beside in steps])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, num_classes, H, W)."""
        beside: list[Tensor] = []
        for place, convolutions in enumerate(self.encoder):
            x = convolutions(F.max_pool2d(x, 2) if place else x)
            beside.append(x)
        beside.pop()
        for convolutions in self.decoder:
            x = convolutions(torch.cat([F.interpolate(x, scale_factor=2.0), beside.pop()], dim=1))
        return self.head(x)


def _convolutions(given: int, wanted: int) -> nn.Sequential:
    """Two 3x3 convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(given, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU()),
        *(nn.Conv2d(wanted, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU()),
    )
