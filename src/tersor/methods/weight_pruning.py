"""Weight pruning: the weights, kernels or filters that matter least are masked to zero.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (magnitude); Zhu and
Gupta, "To prune, or not to prune", 2017 (arXiv 1710.01878: sparsity that rises while the network trains).

    w_hat = m * w       m in {0, 1}, of the shape of w (C_out, C_in, ...): what is shown of a weight
    one-shot            m before the first step: sparsity s
    linear, cubic       s_t = s + (s_0 - s) * (1 - t / t_end)^p, p = 1 or 3, renewed every few steps; s_0 is what was
                        masked before, t_end a fraction of the stage
    a function          s_t = s_0 + (s - s_0) * f(t / t_end)

Four values say how: which go first (`importance`, see `tersor.pruning.weight_importance`), each layer or all together
(`scope`), what is masked as a whole (`granularity`), and when (`sparsity_schedule`). Two of them may be a function of
your own: an importance takes `weight` (C_out, C_in, ...), `name` and `layer`, as far as it names them, and gives
scores; a schedule takes the progress from 0 to 1 and gives the fraction of the way.

What is masked gets no gradient and does not move, by momentum or weight decay neither, and it stays masked: the masks
are nested. Where masks of an earlier stage lie across what this one masks as a whole (other units, N:M, layers that
were sparser), more is masked than was asked. Zhu and Gupta let a masked weight come back only by way of a gradient that
their graph does not pass on either; `dpf` lets it come back. With N:M, of any M weights along the input channels N
stay (NVIDIA's sparse tensor cores take 2:4); where M does not divide them a layer is left whole, as in NVIDIA's ASP. A
masked filter's BatchNorm still sends its constant on. Masks leave the shapes, so dense runtimes are not faster:
`channel_pruning` removes for real.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import InputError
from tersor.core.import_path import import_function, is_function_path, named
from tersor.graph.batchnorm import Norm
from tersor.graph.batchnorm_behind import norms_behind
from tersor.graph.layer_selection import Layer, prunable
from tersor.pruning.topk import Scope, known_granularity, masks, pattern, pattern_mask, unit_scores
from tersor.pruning.weight_importance import (
    IMPORTANCES,
    OF_FILTERS,
    drawn,
    geometric_median,
    gradient_products,
    magnitudes,
    of_function,
    root_mean_squares,
)
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import MaskedAttachment, check_floor, dense_of, lay_masks, mask_of
from tersor.training.method import PLAIN_VALUES
from tersor.training.schedule import curve

_SCHEDULES = ("one_shot", "linear", "cubic")


@dataclass(frozen=True, config=PLAIN_VALUES)
class WeightPruning:
    """Masks on weights, kernels or filters, at once or while the network trains; the shapes stay."""

    example: ClassVar[dict[str, Any]] = {"sparsity": 0.7, "sparsity_schedule": "cubic", "every": 2}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[
        float | None, Field(ge=0, lt=1, description="fraction that is masked; half if left, with N:M 1 - N/M")
    ] = None
    importance: Annotated[
        str,
        AfterValidator(named("importance", IMPORTANCES)),
        Field(description=f"which stay: {', '.join(IMPORTANCES)}, or package.module:function"),
    ] = "magnitude"
    granularity: Annotated[
        str,
        AfterValidator(known_granularity),
        Field(description="what is masked as a whole: weight, kernel, filter; or N:M, of any M weights N stay"),
    ] = "weight"
    scope: Annotated[Scope, Field(description="sparsity of each layer, or of all together")] = "layer"
    floor: Annotated[
        float, Field(ge=0, lt=1, description="of `scope: global`: fraction of each layer that stays; 0 is one unit")
    ] = 0.0
    sparsity_schedule: Annotated[
        str,
        AfterValidator(named("sparsity_schedule", _SCHEDULES)),
        Field(description=f"how it rises over the stage: {', '.join(_SCHEDULES)}, or package.module:function"),
    ] = "one_shot"
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage after which it rises no more")] = 0.75
    every: Annotated[int, Field(ge=1, description="steps between two masks of a rising sparsity")] = 16
    layers: Annotated[
        tuple[str, ...],
        Field(description="patterns; all convolutions if left, or all fully connected layers where there are none"),
    ] = ()
    images: Annotated[int, Field(ge=1, description="of `importance: taylor`: how many are looked at")] = 512
    seed: Annotated[int, Field(ge=0, lt=2**32, description="of `importance: random`")] = 0

    @property
    def needs_steps(self) -> bool:
        """Whether it works while a network trains."""
        return self.sparsity_schedule != "one_shot"

    @property
    def wanted(self) -> float:
        """The sparsity at the end."""
        of_pattern = pattern(self.granularity)
        follows = 0.5 if of_pattern is None else 1 - of_pattern[0] / of_pattern[1]
        return follows if self.sparsity is None else self.sparsity

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Lays a mask of ones on every chosen weight; `begin` masks at once, a schedule from step to step.

        Raises:
            InputError: a pattern that matches nothing, a weight on a grid already, a network that is sparser already,
                a rising sparsity without steps, values that contradict each other or do nothing, a function that
                cannot be found, an importance that needs data or BatchNorm where there is none.
        """
        layers = prunable(model, self.layers)
        if not self.wanted:
            return Attachment(model)
        self._check(context.steps)
        if self.importance == "taylor" and context.data is None:
            gradient_products(model, {}, context.data, self.images)
        layers, notes = self._divided(layers)
        norms = norms_behind(model) if self.importance == "batchnorm" else {}
        for name in layers if self.importance == "batchnorm" else ():
            if name not in norms or not norms[name].affine:
                raise InputError(
                    f"importance: batchnorm asks for the factor of the BatchNorm behind {name}, and there is none. "
                    f"Name the layers that have one, or another importance: {', '.join(IMPORTANCES)}."
                )
        lay_masks(layers, "kept", "weight_pruning")
        return WeightPruningAttachment(self, model, layers, context.data, norms, steps=context.steps, notes=notes)

    def _check(self, steps: int) -> None:
        if self.needs_steps and not steps:
            raise InputError(
                f"sparsity_schedule: {self.sparsity_schedule} rises over the steps of a stage, and there are 0. "
                "Write epochs or steps, or one_shot."
            )
        for name in (self.importance, self.sparsity_schedule):
            if is_function_path(name):
                import_function(name)
        if self.importance in OF_FILTERS and self.granularity != "filter":
            raise InputError(f"importance: {self.importance} is one of filters. Write granularity: filter.")
        if self.importance == "magnitude_l2" and self.granularity not in ("kernel", "filter"):
            raise InputError("magnitude_l2 orders single weights as magnitude does. Write importance: magnitude.")
        of_pattern = pattern(self.granularity)
        if of_pattern is not None and self.scope == "global":
            raise InputError(f"with {self.granularity} all layers are as sparse. Leave out scope: global.")
        if of_pattern is not None and not math.isclose(self.wanted, 1 - of_pattern[0] / of_pattern[1]):
            raise InputError(
                f"granularity {self.granularity} masks {1 - of_pattern[0] / of_pattern[1]:g} of the weights, and "
                f"sparsity {self.sparsity:g} is asked. Leave out sparsity: it follows from N:M."
            )
        if self.floor and self.scope == "layer":
            raise InputError("floor holds weights of a layer against a global threshold. Write scope: global with it.")
        check_floor(self.floor, self.wanted)

    def _divided(self, layers: dict[str, Layer]) -> tuple[dict[str, Layer], list[str]]:
        """Those of the layers that N:M can be laid on, and a note on the others."""
        of_pattern = pattern(self.granularity)
        if of_pattern is None:
            return layers, []
        whole = [name for name, layer in layers.items() if layer.weight.shape[1] % of_pattern[1]]
        if len(whole) == len(layers):
            raise InputError(
                f"{self.granularity} needs layers whose input channels {of_pattern[1]} divides, and there is none."
            )
        shown = ", ".join(whole[:6]) + (f" and {len(whole) - 6} more" if len(whole) > 6 else "")
        notes = [f"left whole, since {of_pattern[1]} does not divide their input channels: {shown}"] if whole else []
        return {name: layer for name, layer in layers.items() if name not in whole}, notes


class WeightPruningAttachment(MaskedAttachment):
    """Masks laid on a model, and how they grow."""

    def __init__(
        self,
        method: WeightPruning,
        model: nn.Module,
        layers: dict[str, Layer],
        data: Iterable[Any] | None,
        norms: dict[str, Norm],
        *,
        steps: int,
        notes: list[str],
    ) -> None:
        super().__init__(model, layers, remaskings=steps // method.every, notes=notes)
        self.method = method
        self.data = data
        self.norms = norms
        self.steps = steps
        self.ramp = max(1, round(method.end * steps))
        self.start = self.sparsity
        if self.start > method.wanted and pattern(method.granularity) is None:
            raise InputError(
                f"the network is {self.start:.4f} sparse already, more than the {method.wanted:g} that is asked. "
                "Masks only grow: write a higher sparsity."
            )
        self.curve = curve(method.sparsity_schedule) if method.needs_steps else None

    def begin(self) -> None:
        """Masks at once where no schedule is asked for."""
        if self.curve is None:
            self._mask(self.method.wanted, 0)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Masks anew, every few steps until the final sparsity."""
        super().after_step(step, optimizer)
        done, every = step + 1, self.method.every
        if self.curve is not None and done <= self.ramp and (done % every == 0 or done == self.ramp):
            reached = self.start + (self.method.wanted - self.start) * self.curve(done / self.ramp)
            last = done == self.ramp
            self._mask(max(self.sparsity, reached), done, 0 if last else done // every)

    def finish(self) -> None:
        """Lands on the exact sparsity, however few the steps were."""
        if round(self.sparsity * self.total) < round(self.method.wanted * self.total):
            self._mask(self.method.wanted, self.steps)
        super().finish()

    @torch.no_grad()
    def _mask(self, sparsity: float, done: int, number: int = 0) -> None:
        scores = self._scores()
        of_pattern = pattern(self.method.granularity)
        if of_pattern is not None:
            kept, of = of_pattern
            staying = max(kept, of - round(sparsity * of))
            shapes = {name: dense_of(layer).shape for name, layer in self.masked.items()}
            found = {name: pattern_mask(each.reshape(shapes[name]), staying, of) for name, each in scores.items()}
        else:
            shapes = {name: dense_of(layer).shape for name, layer in self.masked.items()}
            found = masks(scores, shapes, sparsity, self.method.scope, self.method.floor)
        nested = {name: mask & mask_of(self.masked[name]).mask for name, mask in found.items()}
        self.set_masks(nested, done, number)

    def _scores(self) -> dict[str, Tensor]:
        """Layer -> (units,); what is masked already goes first."""
        method, found = self.method, dict[str, Tensor]()
        unit = "weight" if pattern(method.granularity) else method.granularity
        weights = {name: dense_of(layer) for name, layer in self.masked.items()}
        products = (
            gradient_products(self.model, weights, self.data, method.images) if method.importance == "taylor" else {}
        )
        for number, (name, layer) in enumerate(self.masked.items()):
            scores = self._score(name, weights[name].detach(), unit, number, products)
            found[name] = scores.masked_fill(unit_scores(mask_of(layer).mask.float(), unit) == 0, -torch.inf)
        return found

    def _score(self, name: str, weight: Tensor, unit: str, number: int, products: dict[str, Tensor]) -> Tensor:
        match self.method.importance:
            case "magnitude":
                return magnitudes(weight, unit)
            case "magnitude_l2":
                return root_mean_squares(weight, unit)
            case "taylor":
                return unit_scores(products[name], unit)
            case "batchnorm":
                return self.norms[name].weight.detach().abs()
            case "fpgm":
                return geometric_median(weight)
            case "random":
                return drawn(weight, unit, self.method.seed + number)
            case path:
                return of_function(path, weight, unit, name=name, layer=self.masked[name])
