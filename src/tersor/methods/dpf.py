"""Dynamic pruning with feedback (DPF): magnitude masks change during training, and masked weights are still trained.

Lin, Stich, Barba, Dmitriev and Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020 (arXiv 2006.07253).

    w_hat = m * w                       w (C_out, ...) a dense weight, m in {0, 1} of its shape
    w    <- w - lr * dL/dw_hat          the gradient at w_hat and weight decay update all of w, including masked weights
    m     = |w| among the largest       of all convolutions together, every 16 steps
    s_t   = s + (s_0 - s) * (1 - t / t_n)^3    until t_n, then s; s_0 is the sparsity before the stage, usually 0

A weight that was masked by mistake can grow and become active again: the difference between w and w_hat is the error
that is fed back. t_n is the second drop of the learning rate, at 0.75 of the paper's 300 epochs. The final network is
m * w.

The authors' code was not found. Two reimplementations differ after t_n: the one by INCHEON-CHO (GitHub) keeps the masks
constant, that of Kim et al. (DCIL) keeps updating them. The paper's algorithm updates the mask until the end, at
constant sparsity; so does this implementation. INCHEON-CHO's code compares squared weights, which gives the same order,
and masks every weight up to a threshold; here the sparsity is exact, with ties broken by index. The first mask is set
after `every` steps, and the last layer is dense, as in both implementations.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from tersor.core.plain_values import plain_dataclass
from tersor.graph.layer_selection import prunable
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext, require_steps
from tersor.training.dynamic_masks import DynamicMasks
from tersor.training.mask_attachment import MaskedLayers, check_floor, insert_masks
from tersor.training.method import PLAIN_VALUES


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class DPF:
    """Train all weights under magnitude masks updated every few steps: masked weights can become active again."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"sparsity": 0.6, "every": 2, "end": 0.5, "floor": 0.1}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[float, Field(ge=0, lt=1, description="final fraction of masked weights")] = 0.9
    every: Annotated[int, Field(ge=1, description="steps between two mask updates")] = 16
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage over which the sparsity rises")] = 0.75
    floor: Annotated[
        float, Field(ge=0, lt=1, description="fraction of each layer that always remains; at least one weight")
    ] = 0.0
    layers: MaskedLayers = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Insert masks with a straight-through gradient.

        Raises:
            InputError: no steps, a pattern that matches nothing, a quantized weight, a floor that contradicts the
                sparsity.
        """
        layers = prunable(model, self.layers)
        if not self.sparsity:
            return Attachment(model)
        require_steps(context, "dpf")
        check_floor(self.floor, self.sparsity)
        insert_masks(layers, "straight_through", "dpf")
        return DynamicMasks(model, layers, self, context.steps)
