"""How the masks of a stage moved, in a buffer: so that a run that goes on tells the same as one that never stopped."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

POINTS = 200


class MaskLog(nn.Module):
    """Rows of a step, the sparsity from there on, and what fraction of all mask entries has changed at it."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.full((POINTS, 3), -1.0))

    def clear(self) -> None:
        """Forgets what an earlier stage wrote."""
        self.rows.fill_(-1)

    def add(self, step: int, sparsity: float, changed: float) -> None:
        """Takes one row in; after the last of a step, none of an earlier one. A full log takes no more."""
        used = int((self.rows[:, 0] >= 0).sum())
        if used < POINTS:
            self.rows[used] = torch.tensor([step, sparsity, changed])

    @property
    def told(self) -> dict[str, Any]:
        """`steps`, `sparsity` and `changed`, lists of the same length."""
        rows = self.rows[self.rows[:, 0] >= 0].tolist()
        steps, sparsity, changed = zip(*rows, strict=True) if rows else ((), (), ())
        return {
            "steps": [int(step) for step in steps],
            "sparsity": [round(value, 6) for value in sparsity],
            "changed": [round(value, 6) for value in changed],
        }


def stride(count: int) -> int:
    """Every how many-th of `count` masks is written, so that they and the last fit into a log."""
    return max(1, math.ceil(count / (POINTS - 2)))
