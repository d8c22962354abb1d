"""Boxes with classes, as torchvision's detectors take and return them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.tasks.network_outputs import given_instead
from tersor.tasks.task import PLAIN_VALUES, Pairs, Task, required

CONFIDENT = 0.5
"""Boxes of at least this score count for the agreement of two networks."""

_SAME_BOX = 0.5
_KEYS = ("boxes", "scores", "labels")


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class Detection(Task):
    """For each image a dict of boxes (K, 4), scores (K,) and labels (K,); boxes are x1, y1, x2, y2 in pixels.

    The targets are a list with a dict of boxes and labels for each image. In training mode the network takes images and
    targets and returns its own losses by name. In eval mode it returns a list of dicts, or one dict of tensors with a
    leading dimension N. The metric is the mean average precision at an IoU of 0.5.
    """

    metric: ClassVar[str] = "mAP50"
    boxes: ClassVar[bool] = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The sum of the losses that the network returns.

        Raises:
            InputError: it returns no losses.
        """
        losses = list(cast("Mapping[str, Any]", outputs).values()) if isinstance(outputs, Mapping) else []
        if not losses or not all(isinstance(each, Tensor) and each.ndim == 0 for each in losses):
            raise InputError(
                "in training mode a detector returns a dict of losses, as torchvision's do, not an object of type "
                f"{type(outputs).__name__}. Write a task of your own (package.module:Task) with a loss."
            )
        return torch.stack(losses).sum()

    def inputs(self, batch: Batch, *, training: bool) -> tuple[Any, ...]:
        """The images, and in training mode the targets too."""
        return (batch.images, batch.targets) if training else (batch.images,)

    def predictions(self, outputs: Any) -> list[dict[str, Tensor]]:
        """The boxes, scores and labels of each image.

        Raises:
            InputError: the outputs are something else.
        """
        if isinstance(outputs, Mapping) and all(isinstance(outputs.get(key), Tensor) for key in _KEYS):
            outputs = [dict(zip(_KEYS, one, strict=True)) for one in zip(*(outputs[key] for key in _KEYS), strict=True)]
        if not isinstance(outputs, list | tuple):
            raise _refused(outputs, "the dict")
        images = cast("list[Any]", outputs)
        for number, image in enumerate(images):
            if not isinstance(image, Mapping) or not all(key in image for key in _KEYS):
                raise _refused(image, f"the dict of image {number}")
        return [{key: image[key].detach().cpu() for key in _KEYS} for image in images]

    def score(self, pairs: Pairs) -> float:
        """mAP50 in percent.

        Raises:
            InputError: the targets are not boxes and labels.
        """
        return 100 * max(0.0, float(self._measured(required(pairs, self))["map_50"]))

    def score_by_class(self, pairs: Pairs, classes: int) -> Tensor:
        """AP50 in percent of each class (classes,)."""
        found = self._measured(required(pairs, self))
        values = torch.full((classes,), float("nan"), dtype=torch.float64)
        precision = found["map_per_class"].double().reshape(-1)
        values[found["classes"].reshape(-1).long()] = 100 * precision.where(precision >= 0, float("nan"))
        return values

    def agreement(self, predictions: Any, reference: Any) -> Tensor:
        """For each image (N,), 2 * (boxes that both have) / (boxes of one + boxes of the other).

        Only boxes with a score of at least 0.5 count. Two boxes are the same if the class is equal and the IoU is at
        least 0.5.
        """
        both = zip(predictions, reference, strict=True)
        return torch.tensor([same_boxes(one, other) for one, other in both], dtype=torch.float64)

    def _measured(self, pairs: list[tuple[Any, Any]]) -> dict[str, Tensor]:
        from torchmetrics.detection import MeanAveragePrecision  # imports slowly

        metric = MeanAveragePrecision(iou_thresholds=[_SAME_BOX], class_metrics=True)
        metric.warn_on_many_detections = False
        for predictions, targets in pairs:
            _check(targets, len(predictions))
            metric.update(predictions, [{key: each[key].cpu() for key in ("boxes", "labels")} for each in targets])
        return metric.compute()


def _check(targets: Any, images: int) -> None:
    given: list[Any] = cast("list[Any]", targets) if isinstance(targets, list | tuple) else []
    if len(given) != images or not all(
        isinstance(each, Mapping) and all(isinstance(each.get(key), Tensor) for key in ("boxes", "labels"))
        for each in given
    ):
        raise InputError(
            f"the targets are not a list of {images} dicts with the tensors boxes and labels. Pass one dict of boxes "
            "(K, 4) and labels (K,) for each image."
        )
    for each in given:
        boxes, labels = each["boxes"], each["labels"]
        if boxes.shape != (len(labels), 4):
            raise InputError(
                f"an image has boxes of shape {tuple(boxes.shape)} and labels ({len(labels)},). Pass boxes (K, 4) and "
                "labels (K,)."
            )
        wrong = boxes[~(boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))]
        if len(wrong):
            shown = ", ".join(f"{value:g}" for value in wrong[0].tolist())
            raise InputError(
                f"a target has the box {shown}. Write left, top, right, bottom: right > left, bottom > top."
            )
        if len(labels) and int(labels.min()) < 1:
            raise InputError(
                f"a target has the label {int(labels.min())}. Number the classes of boxes from 1; 0 is the background."
            )


def _refused(given: Any, whose: str) -> InputError:
    """The error for outputs that are no dicts of boxes, scores and labels."""
    expected = f"a detector returns a dict of {', '.join(_KEYS)} for each image"
    missing = [key for key in _KEYS if key not in given] if isinstance(given, Mapping) else []
    if missing:
        return InputError(f"{expected}; {whose} has no {', '.join(missing)}.")
    return InputError(f"{expected}, not {given_instead(given, given if isinstance(given, Tensor) else None)}.")


def same_boxes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return 2 * shared boxes / all boxes of two predictions for an image; only confident boxes count."""
    from torchvision.ops import box_iou

    first, second = (
        {key: each[key][each["scores"] >= CONFIDENT] for key in ("boxes", "labels")} for each in (one, other)
    )
    boxes = len(first["boxes"]) + len(second["boxes"])
    if not boxes:
        return 1.0
    same = box_iou(first["boxes"], second["boxes"]) * (first["labels"][:, None] == second["labels"])
    shared = 0
    while same.numel() and same.max() >= _SAME_BOX:  # the closest pair first; a box is used once
        row, column = divmod(int(same.argmax()), same.shape[1])
        same[row], same[:, column] = 0, 0
        shared += 1
    return 2 * shared / boxes
