"""Numbers for each image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.tasks.network_outputs import given_instead, logits_in
from tersor.tasks.task import PLAIN_VALUES, Pairs, Task, required, whole


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class Regression(Task):
    """One tensor of values (N, ...); the targets are values of the same shape, or (N,) for (N, 1)."""

    metric: ClassVar[str] = "mean absolute error"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean squared error.

        Raises:
            InputError: the shapes of targets and outputs differ.
        """
        values = _values(outputs)
        return F.mse_loss(values, _fitting(targets, values).to(values))

    def predictions(self, outputs: Any) -> Tensor:
        """The values (N, ...)."""
        return _values(outputs).detach().cpu()

    def score(self, pairs: Pairs) -> float:
        """Mean absolute error, in the unit of the targets."""
        from torchmetrics.functional.regression import mean_absolute_error  # imports slowly

        fitting = [(values, _fitting(targets, values)) for values, targets in required(pairs, self)]
        values, targets = whole(fitting)
        return float(mean_absolute_error(values.double().flatten(), targets.double().flatten()))


def _values(outputs: Any) -> Tensor:
    values = logits_in(outputs)
    if values is None:
        raise InputError(f"a regression network returns one tensor of values, not {given_instead(outputs, None)}.")
    return values


def _fitting(targets: Any, values: Tensor) -> Tensor:
    if not isinstance(targets, Tensor):
        raise InputError(f"the targets are of type {type(targets).__name__}. Pass a tensor of values.")
    if targets.numel() != values.numel() or len(targets) != len(values):
        raise InputError(
            f"the targets have the shape {tuple(targets.shape)}, the outputs {tuple(values.shape)}. Pass as many "
            "values for each image as the network returns."
        )
    return targets.reshape(values.shape)
