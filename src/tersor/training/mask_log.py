"""The mask log: when the masks of a stage were updated, the sparsity after each update, and the fraction that changed.

It is part of the training state (`Attachment.state_dict`), so that a resumed run reports the same log.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MAX_ROWS = 200


class MaskLog:
    """One row per mask update.

    Attributes:
        rows: (updates, 3), float32: the step, the sparsity from there on, the fraction of mask entries that changed.
    """

    def __init__(self) -> None:
        self.rows = torch.empty(0, 3)

    def add(self, step: int, sparsity: float, changed: float) -> None:
        """Append a row."""
        self.rows = torch.cat([self.rows, torch.tensor([[step, sparsity, changed]])])

    def load(self, rows: Tensor) -> None:
        """Replace the rows with those of a snapshot.

        Raises:
            ValueError: the tensor has another shape.
        """
        if rows.ndim != 2 or rows.shape[1] != 3:
            raise ValueError(f"a mask log of shape {tuple(rows.shape)}")
        self.rows = rows.float()

    @property
    def columns(self) -> dict[str, Any]:
        """`steps`, `sparsity` and `changed`, lists of the same length."""
        steps, sparsity, changed = self.rows.T.tolist()
        return {
            "steps": [int(step) for step in steps],
            "sparsity": [round(value, 6) for value in sparsity],
            "changed": [round(value, 6) for value in changed],
        }

    @property
    def changes(self) -> list[tuple[int, float]]:
        """The step and the fraction that changed, of every row."""
        return [(int(step), changed) for step, _, changed in self.rows.tolist()]


def log_interval(updates: int) -> int:
    """Return n, so that every n-th of `updates`, the first and the last fit into `MAX_ROWS` rows."""
    return max(1, math.ceil(updates / (MAX_ROWS - 2)))
