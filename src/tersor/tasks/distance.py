"""Any network: its outputs are compared with those of the original network."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from tersor.core.plain_values import plain_dataclass
from tersor.tasks.network_outputs import relative_squared_error, relative_squared_error_of_all
from tersor.tasks.task import PLAIN_VALUES, Pairs, Task, required


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class Distance(Task):
    """Any tensors in any container; the targets are the outputs of the original network.

    The metric is the relative L2 error over all images: the root of the mean over tensors of |change|^2 / |original|^2.
    """

    metric: ClassVar[str] = "relative error"
    higher_is_better: ClassVar[bool] = False
    from_original: ClassVar[bool] = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The relative squared error of the batch."""
        return relative_squared_error(outputs, targets)

    def score(self, pairs: Pairs) -> float:
        """The relative L2 error in percent."""
        return 100 * relative_squared_error_of_all(required(pairs, self)) ** 0.5
