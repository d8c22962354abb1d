"""Weight pruning: the weights, or the filters, that matter least are masked to zero.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (magnitude); Zhu and
Gupta, "To prune, or not to prune", 2017 (arXiv 1710.01878: sparsity that rises while the network trains).

    w_hat = m * w       m in {0, 1}, of the shape of w (C_out, ...): what is shown of a weight
    one-shot            m before the first step: sparsity s
    linear, cubic       s_t = s + (s_0 - s) * (1 - t / t_end)^p, p = 1 or 3, renewed every few steps; s_0 is what was
                        masked before, t_end a fraction of the stage

What is masked gets no gradient and stays masked: the masks are nested. Zhu and Gupta let a masked weight come back
only by way of a gradient that their graph does not pass on either. Whole filters are scored by the mean of |w|; a
masked filter's BatchNorm still sends its constant on. Masks leave the shapes, so dense runtimes are not faster:
`channel_pruning` removes for real.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tersor.core.attachment import Attachment, Progress
from tersor.core.errors import InputError
from tersor.core.masking import Granularity, Scope, masks, unit_scores
from tersor.core.method import PLAIN_VALUES
from tersor.core.parametrization import FakeQuantize, Mask, parametrized, shown_by, weight_mask
from tersor.core.schedule import interpolate
from tersor.core.selection import Layer, prunable
from tersor.core.target import Target

Importance = Literal["magnitude", "random"]


@dataclass(frozen=True, config=PLAIN_VALUES)
class WeightPruning:
    """Masks on weights or filters, at once or while the network trains; the shapes stay."""

    example: ClassVar[dict[str, Any]] = {"sparsity": 0.7, "sparsity_schedule": "cubic", "every": 2}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of the weights that is masked")] = 0.5
    importance: Annotated[Importance, Field(description="which go first: the smallest, or any")] = "magnitude"
    granularity: Annotated[Granularity, Field(description="what is masked as a whole")] = "weight"
    scope: Annotated[Scope, Field(description="sparsity of each layer, or of all together")] = "layer"
    sparsity_schedule: Annotated[
        Literal["one_shot", "linear", "cubic"], Field(description="how the sparsity rises over the stage")
    ] = "one_shot"
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage after which it rises no more")] = 0.75
    every: Annotated[int, Field(ge=1, description="steps between two masks of a rising sparsity")] = 16
    layers: Annotated[
        tuple[str, ...],
        Field(description="patterns; all convolutions if left, or all fully connected layers where there are none"),
    ] = ()
    seed: Annotated[int, Field(ge=0, description="of `importance: random`")] = 0

    @property
    def needs_steps(self) -> bool:
        """Whether it works while a network trains."""
        return self.sparsity_schedule != "one_shot"

    def attach(
        self,
        model: nn.Module,
        *,
        data: Iterable[Any] | None = None,
        teacher: nn.Module | None = None,
        steps: int = 0,
        target: Target | None = None,
    ) -> Attachment:
        """Lays a mask of ones on every chosen weight; `begin` masks at once, a schedule from step to step.

        Raises:
            InputError: a pattern that matches nothing, a weight on a grid already, a network that is sparser already,
                a rising sparsity without steps.
        """
        if self.needs_steps and not steps:
            raise InputError(
                f"sparsity_schedule: {self.sparsity_schedule} rises over the steps of a stage, and there are 0. "
                "Write epochs or steps, or one_shot."
            )
        layers = prunable(model, self.layers)
        if not self.sparsity:
            return Attachment(model)
        for name, layer in layers.items():
            if any(isinstance(each, FakeQuantize) for each in shown_by(layer)):
                raise InputError(
                    f"the weight of {name} is on a grid already, and masks lie under grids: zeros stay zeros only so. "
                    "Write weight_pruning before ptq and qat."
                )
        for layer in layers.values():
            if weight_mask(layer) is None:
                mask = Mask(layer.weight.shape).to(layer.weight.device)
                parametrize.register_parametrization(layer, "weight", mask)
        return WeightPruningAttachment(self, model, layers, steps)


class WeightPruningAttachment(Attachment):
    """Masks laid on a model, and how they grow."""

    def __init__(self, method: WeightPruning, model: nn.Module, layers: dict[str, Layer], steps: int) -> None:
        super().__init__(model)
        self.method = method
        self.masked = layers
        self.ramp = max(1, round(method.end * steps))
        self.start = self._sparsity()
        if self.start > method.sparsity:
            raise InputError(
                f"the network is {self.start:.4f} sparse already, more than the {method.sparsity:g} that is asked. "
                "Masks only grow: write a higher sparsity."
            )

    def begin(self) -> Iterator[Progress]:
        """Masks at once where no schedule is asked for."""
        if self.method.sparsity_schedule == "one_shot":
            self._mask(self.method.sparsity)
            yield Progress("masks", len(self.masked), len(self.masked))

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Masks anew, every few steps until the final sparsity."""
        done = step + 1
        shape = self.method.sparsity_schedule
        if shape != "one_shot" and done <= self.ramp and (done % self.method.every == 0 or done == self.ramp):
            self._mask(interpolate(shape, done / self.ramp, self.start, self.method.sparsity))

    def finish(self) -> None:
        """Lands on the exact sparsity, however few the steps were."""
        self._mask(self.method.sparsity)

    @torch.no_grad()
    def _mask(self, sparsity: float) -> None:
        scores = {name: self._scores(number, layer) for number, (name, layer) in enumerate(self.masked.items())}
        shapes = {name: layer.weight.shape for name, layer in self.masked.items()}
        for name, mask in masks(scores, shapes, sparsity, self.method.scope).items():
            _mask_of(self.masked[name]).copy_(mask)

    def _scores(self, number: int, layer: Layer) -> Tensor:
        """(units,); what is masked already goes first."""
        weight = parametrized(layer).original
        assert isinstance(weight, Tensor)
        if self.method.importance == "magnitude":
            scores = unit_scores(weight.abs(), self.method.granularity)
        else:
            draw = torch.Generator().manual_seed(self.method.seed + number)
            scores = unit_scores(torch.rand(weight.shape, generator=draw), self.method.granularity).to(weight.device)
        masked = unit_scores(_mask_of(layer).float(), self.method.granularity) == 0
        return scores.masked_fill(masked, -torch.inf)

    def _sparsity(self) -> float:
        shown = [_mask_of(layer) for layer in self.masked.values()]
        return 1 - sum(int(mask.sum()) for mask in shown) / sum(mask.numel() for mask in shown)


def _mask_of(layer: Layer) -> Tensor:
    mask = weight_mask(layer)
    assert mask is not None
    return mask.mask
