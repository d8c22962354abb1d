"""Any number of labels for each image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.tasks.network_outputs import given_instead, logits_in
from tersor.tasks.task import PLAIN_VALUES, Pairs, Task, required, whole


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class Multilabel(Task):
    """Logits (N, classes); the targets are 0 or 1 (N, classes). The metric is the mean F1 score of the classes."""

    metric: ClassVar[str] = "F1"
    independent_classes: ClassVar[bool] = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Binary cross entropy, averaged over images and classes.

        Raises:
            InputError: the shapes of targets and logits differ.
        """
        logits = self._logits(outputs)
        _check(targets, logits)
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits))

    def logits(self, outputs: Any) -> Tensor | None:
        """Logits (N, classes), each of an independent label."""
        return logits_in(outputs, rank=2)

    def predictions(self, outputs: Any) -> Tensor:
        """The labels whose probability is above one half (N, classes), bool."""
        return self._logits(outputs).detach().cpu() > 0

    def score(self, pairs: Pairs) -> float:
        """Mean F1 score of the classes that occur, in percent."""
        f1 = self._f1(required(pairs, self))
        return float(f1[~f1.isnan()].mean())

    def score_by_class(self, pairs: Pairs, classes: int) -> Tensor:
        """F1 score in percent of each class (classes,)."""
        return self._f1(required(pairs, self))

    def agreement(self, predictions: Any, reference: Any) -> Tensor:
        """The share of equal labels of each image (N,)."""
        return (predictions == reference).double().mean(1)

    def _logits(self, outputs: Any) -> Tensor:
        logits = self.logits(outputs)
        if logits is None or logits.ndim != 2:
            given = given_instead(outputs, logits)
            raise InputError(f"a multi-label network returns logits (N, classes), not {given}.")
        return logits

    def _f1(self, pairs: list[tuple[Any, Any]]) -> Tensor:
        from torchmetrics.functional.classification import multilabel_f1_score  # imports slowly

        for labels, targets in pairs:
            _check(targets, labels)
        predictions, targets = whole(pairs)
        found = multilabel_f1_score(predictions.int(), targets.int(), predictions.shape[1], average=None)
        occurs = (predictions | targets.bool()).any(0)
        return 100 * found.double().where(occurs, float("nan"))


def _check(targets: Tensor, logits: Tensor) -> None:
    if targets.shape != logits.shape:
        raise InputError(
            f"the targets have the shape {tuple(targets.shape)}, the logits {tuple(logits.shape)}. Pass 0 or 1 for "
            "each image and class: (N, classes)."
        )
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise InputError(
            f"the targets hold numbers from {float(targets.min()):g} to {float(targets.max()):g}. Pass 0 or 1 for each "
            "image and class."
        )
