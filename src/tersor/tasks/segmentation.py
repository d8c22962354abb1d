"""A class for each pixel."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.tasks.network_outputs import given_instead, logits_in
from tersor.tasks.task import PLAIN_VALUES, Pairs, Task, required


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class Segmentation(Task):
    """Logits (N, classes, H, W), alone or under `logits` or `out`; the targets are class indices (N, H, W).

    Logits of a lower resolution than the targets are interpolated for the loss; predicted masks are resized by
    nearest-neighbor interpolation.
    """

    metric: ClassVar[str] = "mIoU"

    num_classes: Annotated[
        int | None, Field(ge=2, description="number of classes; by default as many as occur in targets and predictions")
    ] = None
    ignore_index: Annotated[int, Field(description="class index of pixels that are not counted")] = 255
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="fraction of the label's probability that is spread over all classes")
    ] = 0.0

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Cross entropy, averaged over the pixels.

        Raises:
            InputError: the outputs are not logits, or the targets are not masks.
        """
        logits = self._logits(outputs)
        self.check_masks(targets, len(logits), logits.shape[1])
        if logits.shape[2:] != targets.shape[1:]:
            logits = F.interpolate(logits, targets.shape[1:], mode="bilinear")
        return F.cross_entropy(
            logits, targets.long(), ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
        )

    def logits(self, outputs: Any) -> Tensor | None:
        """Logits (N, classes, H, W)."""
        return logits_in(outputs, rank=4, names=("logits", "out"))

    def predictions(self, outputs: Any) -> Tensor:
        """Class indices (N, H, W), uint8, or int16 for more than 256 classes."""
        logits = self._logits(outputs)
        return logits.detach().argmax(1).to(torch.uint8 if logits.shape[1] <= 256 else torch.int16).cpu()

    def score(self, pairs: Pairs) -> float:
        """Mean IoU in percent of the classes that occur."""
        iou = self._iou(required(pairs, self), self.num_classes)
        return float(iou[~iou.isnan()].mean())

    def score_by_class(self, pairs: Pairs, classes: int) -> Tensor:
        """IoU in percent of each class (classes,)."""
        return self._iou(required(pairs, self), classes)

    def agreement(self, predictions: Any, reference: Any) -> Tensor:
        """For each image (N,), the share of pixels with the same class."""
        return (predictions == reference).double().flatten(1).mean(1)

    def check_masks(self, targets: Tensor, images: int, classes: int | None) -> None:
        """Check that the targets are masks of this many images, and their values classes of the network, if known.

        Raises:
            InputError: they are not.
        """
        if targets.ndim != 3 or len(targets) != images:
            raise InputError(
                f"the targets have the shape {tuple(targets.shape)}, and the number of images is {images}. Pass class "
                "indices (N, H, W)."
            )
        counted = targets[targets != self.ignore_index]
        if not counted.numel():
            return
        if counted.is_floating_point() and not bool((counted == counted.round()).all()):
            raise InputError(
                f"the masks hold numbers that are not class indices, from {float(counted.min()):g} to "
                f"{float(counted.max()):g}. Pass integers."
            )
        least, most = int(counted.min()), int(counted.max())
        if least < 0 or (classes is not None and most >= classes):
            possible = "0 or more" if classes is None else f"0 to {classes - 1}, one for each logit of the network"
            raise InputError(
                f"the masks hold class indices from {least} to {most}. Possible: {possible}, and {self.ignore_index} "
                "for pixels that are not counted (ignore_index)."
            )

    def _logits(self, outputs: Any) -> Tensor:
        logits = self.logits(outputs)
        if logits is None or logits.ndim != 4:
            given = given_instead(outputs, logits)
            raise InputError(f"a segmentation network returns logits (N, classes, H, W), not {given}.")
        return logits

    def _iou(self, pairs: list[tuple[Any, Any]], classes: int | None) -> Tensor:
        """IoU in percent (classes,), NaN where a class is in neither targets nor predictions."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix  # imports slowly

        for mask, targets in pairs:
            self.check_masks(targets, len(mask), classes)
        counted = [(_resized(mask, targets), targets.cpu().long()) for mask, targets in pairs]
        if classes is None:
            used = (targets[targets != self.ignore_index] for _, targets in counted)
            classes = 1 + max(
                max(1, int(each.max()))
                for pair in zip(used, (mask for mask, _ in counted), strict=True)
                for each in pair
                if each.numel()
            )
        matrix = torch.zeros(classes, classes, dtype=torch.int64)
        for mask, targets in counted:
            matrix += multiclass_confusion_matrix(mask, targets, classes, ignore_index=self.ignore_index)
        both = matrix.diagonal().double()
        return 100 * both / (matrix.sum(0) + matrix.sum(1) - both)


def _resized(mask: Tensor, targets: Tensor) -> Tensor:
    """The predicted mask (N, h, w) as int64 in the size of the targets (N, H, W)."""
    if mask.shape == targets.shape:
        return mask.long()
    return F.interpolate(mask[:, None].float(), targets.shape[1:], mode="nearest")[:, 0].long()
