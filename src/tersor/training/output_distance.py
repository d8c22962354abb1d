"""The distance from the teacher's outputs as a loss: for networks without logits, whatever they return."""

from __future__ import annotations

from torch import Tensor

from tersor.data.batch import Batch
from tersor.tasks.network_outputs import relative_squared_error
from tersor.training.objective import LossTerm, Outputs


class OutputDistance(LossTerm):
    """The weighted relative squared error over all floating-point tensors of the outputs."""

    name = "output_distance"

    def __init__(self, loss_weight: float) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; targets are not used."""
        assert teacher is not None
        return self.loss_weight * relative_squared_error(student.outputs, teacher.outputs)
