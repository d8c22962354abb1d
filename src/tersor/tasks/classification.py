"""One class for each image."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch_errors import labels_error
from tersor.tasks.network_outputs import described, logits_in
from tersor.tasks.task import PLAIN_VALUES, Pairs, Task, required, whole


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class Classification(Task):
    """Logits (N, classes), or one logit (N, 1) of two classes; the targets are class indices (N,)."""

    metric: ClassVar[str] = "accuracy"

    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="fraction of the label's probability that is spread over all classes")
    ] = 0.0

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Cross entropy.

        Raises:
            InputError: the outputs are not logits, or the targets are not their class indices.
        """
        logits = self.logits(outputs)
        if logits is None:
            raise InputError(
                f"in training mode the network returns a {type(outputs).__name__}, not logits (N, classes). Build it "
                "without auxiliary heads (aux_logits=False)."
            )
        try:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        except (IndexError, RuntimeError, ValueError) as error:
            wrong = labels_error(targets, *logits.shape) if isinstance(targets, Tensor) else None
            if wrong is None:
                raise
            raise wrong from error

    def logits(self, outputs: Any) -> Tensor | None:
        """Logits (N, classes)."""
        return logits_in(outputs, rank=2)

    def predictions(self, outputs: Any) -> Tensor:
        """Class indices (N,), int64. With a single logit, class 1 is predicted where it is above 0.

        Raises:
            InputError: the outputs are not logits, or could be logits or probabilities.
        """
        logits = self.logits(outputs)
        if logits is None:
            raise InputError(
                f"the network returns {described(outputs)}, and it is not clear which one contains the logits. Return "
                "them under the key 'logits', or the logits alone."
            )
        if logits.ndim != 2:
            raise InputError(
                f"a classifier returns logits (N, classes), but this network returned {described(logits)}. If it is "
                "not a classifier, set its task, such as `--task segmentation` (`task: segmentation` in a recipe)."
            )
        logits = logits.detach().cpu()
        return _class_of_single_logit(logits[:, 0]) if logits.shape[1] == 1 else logits.argmax(1)

    def score(self, pairs: Pairs) -> float:
        """Top-1 accuracy in percent."""
        predictions, targets = whole(required(pairs, self))
        return 100 * (predictions == targets).double().mean().item()

    def score_by_class(self, pairs: Pairs, classes: int) -> Tensor:
        """Accuracy in percent of the images of each class (classes,)."""
        predictions, targets = whole(required(pairs, self))
        right = torch.bincount(targets[predictions == targets], minlength=classes)
        return 100 * right.double() / torch.bincount(targets, minlength=classes)

    def agreement(self, predictions: Any, reference: Any) -> Tensor:
        """1 where the class is the same (N,)."""
        return (predictions == reference).double()


CLASSIFICATION = Classification()
"""The default task."""


def _class_of_single_logit(logits: Tensor) -> Tensor:
    """Class 1 where the single logit (N,) is above 0."""
    if ((logits >= 0) & (logits <= 1)).all():
        raise InputError(
            "the network has one output per image, all between 0 and 1: it is not clear whether these are logits or "
            "probabilities. Export it with two logits, one for each class, or without the sigmoid."
        )
    return (logits > 0).long()
