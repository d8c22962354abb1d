"""Any network: its outputs are compared with those of the original network."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from tersor.tasks.network_outputs import floats_of_both, relative_squared_error, squares
from tersor.tasks.task import PLAIN_VALUES, Pairs, Task, required


@dataclass(frozen=True, config=PLAIN_VALUES)
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
        sums: list[tuple[float, float]] = []
        for predictions, targets in required(pairs, self):
            both = floats_of_both(predictions, targets)
            found = [tuple(map(float, squares(one.double(), other.double()))) for one, other in both]
            sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums or [(0.0, 0.0)] * len(found), found, strict=True)]
        return 100 * (sum(change / max(size, 1e-300) for change, size in sums) / len(sums)) ** 0.5
