"""Dynamic pruning with feedback: masks of today's largest weights, laid on dense weights that go on learning.

Lin, Stich, Barba, Dmitriev and Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020 (arXiv 2006.07253).

    w_hat = m * w                       w (C_out, ...) a dense weight, m in {0, 1} of its shape
    w    <- w - lr * dL/dw_hat          the gradient at w_hat moves all of w, masked weights too, and decay is on all
    m     = |w| among the largest       of all convolutions together, every 16 steps
    s_t   = s + (s_0 - s) * (1 - t / t_n)^3    until t_n, then s; s_0 is what was masked before the stage, mostly 0

So a weight that was masked wrongly grows and comes back: the difference of w and w_hat is the error that is fed back.
t_n is the second drop of the learning rate, at 0.75 of the paper's 300 epochs. What is left at the end is m * w.

The authors' code was not found. Two others reproduce the paper and disagree after t_n: INCHEON-CHO's masks stand still
from there, Kim et al.'s (DCIL) go on. The paper's algorithm renews the mask to the end, and only its size is fixed; so
here. INCHEON-CHO's code squares weights, which is the same order, and keeps what is larger than a threshold; here as
many are masked as asked, ties by index. The first mask is set after `every` steps, and the last layer is dense, as in
both codes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from tersor.graph.layer_selection import prunable
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import DynamicMasks, check_floor, check_steps, lay_masks
from tersor.training.method import PLAIN_VALUES


@dataclass(frozen=True, config=PLAIN_VALUES)
class DPF:
    """Masks that are renewed while all weights learn, so that what was masked may come back."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"sparsity": 0.6, "every": 2, "end": 0.5, "floor": 0.1}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of the weights that is masked at the end")] = 0.9
    every: Annotated[int, Field(ge=1, description="steps between two masks")] = 16
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage after which the sparsity is fixed")] = (
        0.75
    )
    floor: Annotated[float, Field(ge=0, lt=1, description="fraction of each layer that stays; 0 is one weight")] = 0.0
    layers: Annotated[
        tuple[str, ...],
        Field(description="patterns; all convolutions if left, or all fully connected layers where there are none"),
    ] = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Lays a mask on every chosen weight, with a gradient straight through.

        Raises:
            InputError: no steps, a pattern that matches nothing, a weight on a grid already, a floor that leaves too
                little to mask.
        """
        layers = prunable(model, self.layers)
        if not self.sparsity:
            return Attachment(model)
        check_steps(context.steps, "dpf")
        check_floor(self.floor, self.sparsity)
        lay_masks(layers, "all", "dpf")
        return DynamicMasks(
            model,
            layers,
            sparsity=self.sparsity,
            every=self.every,
            end=self.end,
            floor=self.floor,
            steps=context.steps,
        )
