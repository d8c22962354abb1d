"""Network, task and images of `bench/detection.py`: torchvision's FCOS on photographs of blood cells.

The convolutions of FCOS, backbone and head, are the network: they can be captured, trained, compressed and exported.
The anchors, the loss and the post-processing (box decoding, non-maximum suppression) are torchvision's too, and belong
to the task, since their shapes depend on values.
"""

from __future__ import annotations

import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList

from images import SHARED, folder
from tersor.data import Splits, load
from tersor.data.batch import Batch
from tersor.tasks.detection import Detection

CLASSES = 4
"""Background, platelets, red and white cells."""
SIZE = (160, 192)
"""Height and width of the images, multiples of 32; the photographs have (480, 640)."""
STRIDES = (8, 16, 32)
WIDTH = 64


class Convolutions(nn.Module):
    """Backbone and head of an FCOS: images (N, 3, H, W) -> logits, box sides and centerness of every anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = BackboneWithFPN(resnet18(), {"layer2": "0", "layer3": "1"}, [128, 256], WIDTH)
        self.head = FCOSHead(WIDTH, num_anchors=1, num_classes=CLASSES, num_convs=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps of all levels: cls_logits (N, A, 4), bbox_regression (N, A, 4) and bbox_ctrness (N, A, 1)."""
        return self.head([*self.backbone(x).values()])


def fcos(network: nn.Module) -> FCOS:
    """Return torchvision's detector around a backbone and a head; the images are normalized already."""
    anchors = AnchorGenerator(tuple((stride / 2,) for stride in STRIDES), ((1.0,),) * len(STRIDES))
    sides = {"min_size": min(SIZE), "max_size": max(SIZE), "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    parts = {"backbone": network.backbone, "head": network.head}
    return FCOS(num_classes=CLASSES, anchor_generator=anchors, score_thresh=0.05, **parts, **sides)


@dataclass(frozen=True)
class CellDetection(Detection):
    """The loss and the post-processing of torchvision's FCOS for the outputs of `Convolutions`; mAP50."""

    def inputs(self, batch: Batch, *, training: bool) -> tuple[Any, ...]:
        """The images."""
        return (batch.images,)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The sum of the focal loss, the GIoU loss and the loss of the centerness."""
        anchors = _anchors(len(targets))
        return torch.stack([*_detector().compute_loss(targets, outputs, anchors, _levels()).values()]).sum()

    def predictions(self, outputs: Any) -> list[dict[str, Tensor]]:
        """The boxes that remain after non-maximum suppression."""
        return found(outputs)


def found(outputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the boxes, scores and labels of each image, as torchvision's FCOS does."""
    count = len(outputs["cls_logits"])
    levels = {key: [*outputs[key].detach().cpu().split(_levels(), 1)] for key in outputs}
    anchors = [[*each.split(_levels())] for each in _anchors(count)]
    return _detector().postprocess_detections(levels, anchors, [SIZE] * count)


@cache
def _detector() -> FCOS:
    """A detector whose weights are not used."""
    return fcos(Convolutions()).eval()


def _levels() -> list[int]:
    return [height * width for height, width in _grids()]


def _grids() -> list[tuple[int, int]]:
    return [(SIZE[0] // stride, SIZE[1] // stride) for stride in STRIDES]


@cache
def _anchors(count: int) -> list[Tensor]:
    with torch.inference_mode(mode=False):  # they are kept, and the loss needs them too
        maps = [torch.empty(count, 1, *grid) for grid in _grids()]
        return _detector().anchor_generator(ImageList(torch.empty(count, 3, *SIZE), [SIZE] * count), maps)


@cache
def cells() -> Splits:
    """BCCD with its lists: 205 photographs to train, 87 for validation, 72 to test."""
    root = folder().parent
    if not (root / "bccd").exists():
        with tempfile.TemporaryDirectory(dir=root) as part, tarfile.open(SHARED / "data" / "bccd.tar.gz") as tar:
            tar.extractall(part, filter="data")
            (Path(part) / "bccd").rename(root / "bccd")
    return load(folder=root / "bccd", image_size=SIZE)
