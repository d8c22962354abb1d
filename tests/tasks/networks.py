"""A tiny network, images and targets for each task, and datasets that a recipe can name."""

from __future__ import annotations

import torch
from torch import nn

from tersor.data import Splits
from tersor.data.image_sets import Pixels
from tersor.tasks.task import Task

SIDE = 16
CLASSES = ("nothing", "dark", "bright")


class Trunk(nn.Module):
    """Two convolutions, and a head that depends on the task."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = head

    def forward(self, images):
        return self.head(self.conv2(self.conv1(images).relu()).relu())


def pooled(outputs: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, outputs))


class Mask(Trunk):
    """Returns a dict like the segmentation networks of torchvision."""

    def forward(self, images):
        return {"out": super().forward(images)}


class Boxes(nn.Module):
    """A detector with four boxes for each image; in training mode it takes targets and returns its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk(pooled(4 * 6))

    def forward(self, images, targets=None):
        found = self.trunk(images).view(-1, 4, 6)
        corner, size = found[..., :2].sigmoid() * 8, 1 + 7 * found[..., 2:4].sigmoid()
        boxes = torch.cat([corner, corner + size], 2)
        if targets is not None:
            wanted = torch.stack([each["boxes"][0] for each in targets])
            return {"box": (boxes[:, 0] - wanted).abs().mean() / SIDE, "score": (found[:, 0, 4] - 2).square().mean()}
        labels = torch.ones_like(found[..., 5], dtype=torch.int64)
        return {"boxes": boxes, "scores": found[..., 4].sigmoid(), "labels": labels}


class Several(Trunk):
    """Returns a tensor and a dict that belong to no known task."""

    def forward(self, images):
        features = self.conv2(self.conv1(images).relu()).relu()
        return {"features": features.mean(1), "values": self.head(features)}


class CountsError(Task):
    """A user's own task: the largest error of a value, with a custom loss."""

    metric = "largest error"
    unit = ""
    higher_is_better = False

    def loss(self, outputs, targets):
        return (outputs - targets).abs().mean()

    def score(self, pairs):
        return max(float((outputs - targets).abs().max()) for outputs, targets in pairs)


def network(task: str) -> nn.Module:
    """A network for a task, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "segmentation": lambda: Mask(nn.Conv2d(16, 3, 1)),
            "detection": Boxes,
            "multilabel": lambda: Trunk(pooled(3)),
            "regression": lambda: Trunk(pooled(2)),
            "embedding": lambda: Trunk(pooled(8)),
            "distance": lambda: Several(pooled(5)),
            "classification": lambda: Trunk(pooled(3)),
        }[task]
        return made().eval()


def targets(task: str, images: torch.Tensor):
    """Targets of uint8 images (N, 3, H, W) for a task; None if they are the outputs of the original."""
    gray = images.float().mean(1)
    mean = gray.mean((1, 2))
    if task == "segmentation":
        return torch.bucketize(gray, torch.tensor([90.0, 160.0]))
    if task == "detection":
        boxes = torch.tensor([[2.0, 2.0, 9.0, 9.0]])
        return [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]
    if task == "multilabel":
        return torch.stack([mean > 127, mean > 128, mean > 129], 1).long()
    if task == "regression":
        return torch.stack([mean, gray.std((1, 2))], 1) / 255
    return (mean > 127.5).long() if task == "classification" else None


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    """Noise (N, 3, H, W), uint8."""
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).byte()


def batches(task: str, count: int = 16) -> list:
    """A user's batches of 8: tuples of normalized images and targets, or images alone."""
    raw = pixels(count)
    images, wanted = raw.float() / 127.5 - 1, targets(task, raw)
    places = range(0, count, 8)
    if wanted is None:
        return [images[place : place + 8] for place in places]
    return [(images[place : place + 8], wanted[place : place + 8]) for place in places]


def splits(task: str) -> Splits:
    """Data for a recipe."""
    sets = [Pixels((raw := pixels(count, seed)).permute(0, 2, 3, 1).contiguous(), targets(task, raw))
            for seed, count in enumerate((24, 8, 16))]  # fmt: skip
    names = CLASSES if task in {"segmentation", "detection", "multilabel"} else ()
    return Splits(*sets, names, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def segmentation_splits() -> Splits:
    """The data of a segmentation, for a recipe or `tersor eval`."""
    return splits("segmentation")


def unlabelled() -> Splits:
    """Images without targets."""
    return splits("distance")


def masks() -> nn.Module:
    """A network for segmentation."""
    return network("segmentation")


def several() -> nn.Module:
    """A network of no known task."""
    return network("distance")
