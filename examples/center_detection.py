"""A detector that can be captured as a whole, and its task. `recipes/detection.yaml` uses both.

Zhou et al., "Objects as Points", arXiv:1904.07850. The network returns maps at a quarter of the image's size: a logit
for the center of each class, and the distances from there to the sides of the box, instead of the paper's size and
offset. Loss, decoding and metric belong to the task, so that every method can train the network, and the exported file
holds convolutions only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from tersor.tasks.detection import Detection

STRIDE = 4
MOST = 20
"""Largest number of boxes for an image."""


class CenterNet(nn.Module):
    """Predicts maps of centers and sides. The height and width of the images must be multiples of four.

    Args:
        num_classes: number of classes, including the background (class 0), which has no map.
        width: channels of the last layers.
    """

    def __init__(self, num_classes: int = 11, width: int = 64) -> None:
        super().__init__()
        half = width // 2
        layers = [_layer(3, half), _layer(half, half, 2), _layer(half, width), _layer(width, width, 2)]
        self.trunk = nn.Sequential(*layers, *(_layer(width, width) for _ in range(4)))
        self.centers = nn.Sequential(_layer(width, width), nn.Conv2d(width, num_classes - 1, 1))
        self.sides = nn.Sequential(_layer(width, width), nn.Conv2d(width, 4, 1))
        nn.init.constant_(self.centers[1].bias, -4)  # centers are rare

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) -> centers (N, classes - 1, H / 4, W / 4) and sides (N, 4, H / 4, W / 4)."""
        x = self.trunk(x)
        return {"centers": self.centers(x), "sides": self.sides(x)}


def _layer(given: int, wanted: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, wanted, 3, stride, 1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU())


@dataclass(frozen=True)
class CenterDetection(Detection):
    """The task of `CenterNet`: focal loss of the centers and GIoU loss of the boxes; mAP50."""

    def inputs(self, batch: Any, *, training: bool) -> tuple[Any, ...]:
        """Return the images, the only input of the network."""
        return (batch.images,)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the paper's penalty-reduced focal loss plus the GIoU loss at the centers, both per box."""
        centers = outputs["centers"]
        wanted = torch.zeros_like(centers)
        cells: list[Tensor] = []
        boxes = torch.cat([target["boxes"] for target in targets])
        for number, target in enumerate(targets):
            places = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / (2 * STRIDE)
            column, row = places.long().unbind(1)
            for box, label, place in zip(target["boxes"], target["labels"] - 1, places, strict=True):
                heat = _gaussian(centers.shape[2:], place, (box[2:] - box[:2]) / (6 * STRIDE))
                wanted[number, label] = torch.maximum(wanted[number, label], heat)
            wanted[number, target["labels"] - 1, row, column] = 1
            cells.append(torch.stack([torch.full_like(row, number), row, column]))
        near = torch.sigmoid(centers)
        hit = torch.where(wanted == 1, (1 - near) ** 2 * F.logsigmoid(centers), 0)
        miss = torch.where(wanted < 1, (1 - wanted) ** 4 * near**2 * F.logsigmoid(-centers), 0)
        number, row, column = torch.cat(cells, 1)
        found = _boxes(outputs["sides"])[number, :, row, column]
        return (generalized_box_iou_loss(found, boxes, reduction="sum") - hit.sum() - miss.sum()) / max(1, len(boxes))

    def predictions(self, outputs: Any) -> list[dict[str, Tensor]]:
        """Return the boxes at the highest peaks of the centers."""
        heat = torch.sigmoid(outputs["centers"].detach().cpu())
        peaks = torch.where(heat == F.max_pool2d(heat, 3, 1, 1), heat, 0).flatten(1)
        scores, places = peaks.topk(min(MOST, peaks.shape[1]))
        labels, cells = places // heat[0, 0].numel(), places % heat[0, 0].numel()
        boxes = _boxes(outputs["sides"].detach().cpu()).flatten(2).transpose(1, 2)
        found = [each[cell] for each, cell in zip(boxes, cells, strict=True)]
        rows = zip(found, scores, labels + 1, strict=True)
        return [{"boxes": each, "scores": score, "labels": label} for each, score, label in rows]


def _gaussian(size: torch.Size, place: Tensor, deviation: Tensor) -> Tensor:
    """Return a Gaussian with peak 1 at `place` (x, y) of a map (h, w); place and `deviation` (2,) are in cells."""
    y = torch.arange(size[0], device=place.device)[:, None] + 0.5 - place[1]
    x = torch.arange(size[1], device=place.device) + 0.5 - place[0]
    return torch.exp(-0.5 * ((x / deviation[0]) ** 2 + (y / deviation[1]) ** 2))


def _boxes(sides: Tensor) -> Tensor:
    """Convert distances to the sides (N, 4, h, w), in cells before softplus, to boxes (N, 4, h, w) in pixels."""
    y, x = (torch.arange(length, device=sides.device) + 0.5 for length in sides.shape[2:])
    left, top, right, bottom = F.softplus(sides).unbind(1)
    return STRIDE * torch.stack([x - left, y[:, None] - top, x + right, y[:, None] + bottom], 1)
