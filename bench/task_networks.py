"""Networks, images and targets of `bench/tasks.py`: scenes, digits and strips of digits. Its recipes name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import tasks
from tersor.data import Batches, Images, Splits, load
from tersor.data.image_sets import Pixels
from tersor.models import build
from tersor.recipe import Recipe
from tersor.tasks.network_outputs import logits_in
from tersor.tasks.task import Pairs, Task, required

BLANK = 0
"""Class of CTC between two digits; 1 + d is the digit d, and targets are padded with it."""

BATCH = 32

_LONGEST = 5
_SIDE = 16


class Strips(Task):
    """Logits (N, 11, T) of a CTC head; the targets are 1 + d of 3 to 5 digits (N, 5), padded with zeros."""

    metric = "sequence accuracy"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The CTC loss, averaged over digits and images."""
        scores = F.log_softmax(outputs, 1).permute(2, 0, 1)
        steps = torch.full((len(outputs),), outputs.shape[2])
        return F.ctc_loss(scores, targets, steps, (targets != BLANK).sum(1), blank=BLANK)

    def logits(self, outputs: Any) -> Tensor | None:
        """Logits (N, 11, T)."""
        return logits_in(outputs, rank=3)

    def predictions(self, outputs: Any) -> Tensor:
        """Sequences (N, T): the most likely class of each position, without repetitions and blanks, padded."""
        logits = self.logits(outputs)
        assert logits is not None
        best = logits.detach().cpu().argmax(1)
        repeated = F.pad(best[:, 1:] == best[:, :-1], (1, 0))
        kept = torch.where(repeated, BLANK, best)
        order = (kept == BLANK).int().argsort(dim=1, stable=True)
        return kept.gather(1, order)

    def score(self, pairs: Pairs) -> float:
        """The share of strips in percent of which every digit is right."""
        right = [
            (found == F.pad(wanted.cpu(), (0, found.shape[1] - wanted.shape[1]))).all(1)
            for found, wanted in required(pairs, self)
        ]
        return 100 * torch.cat(right).double().mean().item()

    def agreement(self, predictions: Any, reference: Any) -> Tensor:
        """1 where the whole sequence is the same (N,)."""
        return (predictions == reference).all(1).double()


class StripNetwork(nn.Module):
    """Convolutions, then one vector of logits for every fourth column: (N, 3, 16, W) -> (N, 11, W / 4)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(_layer(3, width), _layer(width, width, 2), _layer(width, 2 * width)),
            *(_layer(2 * width, 2 * width, 2), _layer(2 * width, 2 * width), _layer(2 * width, 2 * width)),
        )
        self.head = nn.Conv1d(2 * width, 11, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 16, W) -> logits (N, 11, W / 4)."""
        return self.head(self.trunk(x).mean(2))


def _layer(given: int, wanted: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, wanted, 3, stride, 1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU())


def unet() -> nn.Module:
    """segmentation-models-pytorch's UNet with a resnet18 and random weights."""
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, classes=11)


def strip_network() -> nn.Module:
    """The network that reads strips, with random weights."""
    return StripNetwork()


@cache
def scenes() -> Splits:
    """The bundled scenes with their masks: 1,800 to train, 200 for validation, 500 to test."""
    return load(name="scenes")


@cache
def inked() -> Splits:
    """Scikit-learn's digits and their ink: 1,294 to train, 144 for validation, 359 to test."""
    return _digits_with(_ink)


@cache
def labelled() -> Splits:
    """The same digits with three labels each."""
    return _digits_with(_labels)


def _digits_with(targets: Callable[[Images], Tensor]) -> Splits:
    digits = load(name="digits")
    train, validation, test = (
        Pixels(images.take(torch.arange(len(images))).permute(0, 2, 3, 1).contiguous(), targets(images))
        for images in (digits.train, digits.validation, digits.test)
    )
    return replace(digits, train=train, validation=validation, test=test, classes=())


def _ink(images: Images) -> Tensor:
    """The mean ink of each digit (N, 1), in standard deviations from the mean of all."""
    values = images.take(torch.arange(len(images))).float().mean((1, 2, 3)) / 255
    return ((values - 0.306) / 0.034)[:, None]


def _labels(images: Images) -> Tensor:
    """Three labels of each digit (N, 3): whether it is odd, above four, and has a loop (0, 6, 8, 9)."""
    digit = images.targets
    loop = torch.isin(digit, torch.tensor([0, 6, 8, 9]))
    return torch.stack([digit % 2 == 1, digit > 4, loop], 1).long()


@cache
def strips() -> Splits:
    """Strips of 3 to 5 digits with gaps and noise: 3,000 to train, 300 for validation, 1,000 to test."""
    digits = load(name="digits")
    sets = ((digits.train, 3000), (digits.validation, 300), (digits.test, 1000))
    train, validation, test = (_strips(images, count, seed) for seed, (images, count) in enumerate(sets))
    return Splits(train, validation, test, (), (0.4, 0.4, 0.4), (0.3, 0.3, 0.3))


def _strips(digits: Images, count: int, seed: int) -> Pixels:
    draw = torch.Generator().manual_seed(seed)
    pixels = digits.take(torch.arange(len(digits)))[:, :1].float()
    large = F.interpolate(pixels, (_SIDE, _SIDE), mode="bilinear")[:, 0]
    canvas = 60 * torch.rand(count, _SIDE, 6 * _SIDE, generator=draw)
    targets = torch.zeros(count, _LONGEST, dtype=torch.int64)
    for strip, wanted in zip(canvas, targets, strict=True):
        length = int(torch.randint(3, _LONGEST + 1, (), generator=draw))
        left = 0
        for place, number in enumerate(torch.randint(len(large), (length,), generator=draw).tolist()):
            left += int(torch.randint(0, 4, (), generator=draw))
            strip[:, left : left + _SIDE] += 0.75 * large[number]
            wanted[place] = 1 + digits.targets[number]
            left += _SIDE - 1
    grey = canvas.clamp(max=255).byte()
    return Pixels(grey[..., None].expand(*grey.shape, 3).contiguous(), targets)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network and its task.

    Attributes:
        task: as in a recipe.
        network: in words.
        model: as in a recipe, without weights.
        data: images and targets.
        name: name of the data, as in a recipe.
        epochs: epochs of the original's training.
        learning_rate: learning rate of AdamW, for the original; fine-tuning takes a third.
        taught: whether it has logits, so that it can learn from its own soft targets.
        seeds: seeds of the training runs.
    """

    task: str
    network: str
    model: dict[str, Any]
    data: Callable[[], Splits]
    epochs: int
    learning_rate: float = 0.003
    taught: bool = True
    seeds: int = 3

    def recipe(self, stage: dict[str, Any], seed: int, weights: Path | None = None) -> Recipe:
        """Return one stage of training, from random weights or from a file."""
        model = self.model if weights is None else {**self.model, "weights": weights}
        return Recipe.model_validate(
            {
                "task": self.task,
                "model": model,
                "teacher": None if weights is None else "original",
                "data": {"name": f"task_networks:{self.data.__name__}"},
                "seed": seed,
                "stages": [{"name": "train", "batch_size": BATCH, **stage}],
            }
        )

    def fresh(self) -> nn.Module:
        """Return the network with random weights."""
        return build(self.model["name"], self.model.get("num_classes"))

    def goal(self) -> Task:
        """Return the task."""
        return tasks.build(self.task)

    def test(self) -> Batches:
        """Return the test images in order."""
        images = self.data()
        return Batches(images.test, 50, mean=images.mean or (), std=images.std or ())

    def batches(self, seed: int, size: int = BATCH) -> Batches:
        """Return training images in random order."""
        images = self.data()
        return Batches(images.train, size, mean=images.mean or (), std=images.std or (), shuffle=True, seed=seed)


SUBJECTS = {
    "segmentation": Subject(
        "segmentation", "UNet (resnet18)", {"name": "task_networks:unet"}, scenes, 20, 0.001, seeds=1
    ),
    "regression": Subject("regression", "ResNet-20", {"name": "resnet20", "num_classes": 1}, inked, 30, taught=False),
    "multilabel": Subject("multilabel", "ResNet-20", {"name": "resnet20", "num_classes": 3}, labelled, 20),
    "strips": Subject("task_networks:Strips", "CTC head", {"name": "task_networks:strip_network"}, strips, 15),
}
