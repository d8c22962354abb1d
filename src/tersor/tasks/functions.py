"""A task from plain functions: another loss or metric for a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tersor.core.errors import InputError
from tersor.core.user_code import user_code
from tersor.data.batch import Batch
from tersor.tasks.network_outputs import described
from tersor.tasks.task import Pairs, Task, required


class FromFunctions(Task):
    """A task with the user's own functions.

    Args:
        base: the task for everything else.
        own_loss: (outputs, targets) -> scalar tensor, in training mode; None for that of `base`.
        own_metric: (outputs, targets) -> number, averaged over the images; or a torchmetrics Metric; None for that of
            `base`.
    """

    def __init__(self, base: Task, own_loss: Callable[..., Tensor] | None, own_metric: Any) -> None:
        self.base = base
        self._loss = own_loss
        self._metric = own_metric
        self._own = own_metric is not None
        if own_metric is not None:
            better = getattr(own_metric, "higher_is_better", None)
            attributes = {"metric": named(own_metric), "unit": "", "higher_is_better": better is not False}
        else:
            attributes = {"metric": base.metric, "unit": base.unit, "higher_is_better": base.higher_is_better}
        attributes["from_original"] = base.from_original and own_loss is None and own_metric is None
        attributes |= {
            "independent_classes": base.independent_classes,
            "ignore_index": getattr(base, "ignore_index", None),
        }
        vars(self).update(attributes)  # attributes of this instance replace those of the class

    def inputs(self, batch: Batch, *, training: bool) -> tuple[Any, ...]:
        """Return the inputs of the base task."""
        return self.base.inputs(batch, training=training)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The user's loss."""
        if self._loss is None:
            return self.base.loss(outputs, targets)
        with user_code(f"the loss {named(self._loss)}", self._loss):
            return self._loss(outputs, targets)

    def logits(self, outputs: Any) -> Tensor | None:
        """Return the logits of the base task."""
        return self.base.logits(outputs)

    def predictions(self, outputs: Any) -> Any:
        """Return the outputs for a user-defined metric, otherwise the predictions of the base task."""
        return super().predictions(outputs) if self._own else self.base.predictions(outputs)

    def score(self, pairs: Pairs) -> float:
        """The user's metric.

        Raises:
            InputError: it is not one number.
        """
        if not self._own:
            return self.base.score(pairs)
        found = required(pairs, self)
        with user_code(f"the metric {self.metric}", self._metric):
            return self._scored(found)

    def _scored(self, pairs: list[tuple[Any, Any]]) -> float:
        if hasattr(self._metric, "compute"):
            self._metric.reset()
            for outputs, targets in pairs:
                self._metric.update(outputs, targets)
            return self._number(self._metric.compute())
        counts = [_rows(targets) for _, targets in pairs]
        values = [self._number(self._metric(outputs, targets)) for outputs, targets in pairs]
        return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

    def _number(self, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"the metric {self.metric} returned {described(value)}. Return one number.") from None

    def score_by_class(self, pairs: Pairs, classes: int) -> Tensor | None:
        """Return the base task's metric of each class."""
        return None if self._own else self.base.score_by_class(pairs, classes)

    def agreement(self, predictions: Any, reference: Any) -> Tensor:
        """Return the agreement of the base task."""
        if self._own:
            predictions, reference = (self.base.predictions(each) for each in (predictions, reference))
        return self.base.agreement(predictions, reference)


def _rows(targets: Any) -> int:
    """The number of images: a list has an entry for each, every tensor in another container a row."""
    return len(targets) if isinstance(targets, list) else len(tree_leaves(targets)[0])


def named(function: object) -> str:
    """The name of a function, or of the class of an object that is called."""
    return getattr(function, "__name__", type(function).__name__)
