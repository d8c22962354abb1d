"""Weight pruning: masks the least important weights, kernels or filters, at once or gradually during training.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (magnitude); Zhu and
Gupta, "To prune, or not to prune", 2017 (arXiv 1710.01878: gradual pruning).

    w_hat = m * w       m in {0, 1}, of the shape of w (C_out, C_in, ...)
    one-shot            m is set once, before the first step, with sparsity s
    linear, cubic       s_t = s + (s_0 - s) * (1 - t / t_end)^p, p = 1 or 3, updated every few steps; s_0 is the
                        sparsity before the stage, t_end a fraction of the stage
    a function          s_t = s_0 + (s - s_0) * f(t / t_end)

Four parameters control the masks: `importance` (see `tersor.pruning.weight_importance`) decides which weights are
masked first, `scope` whether they are compared within each layer or across all layers, `granularity` the unit that is
masked, and `sparsity_schedule` when. Importance and schedule can be your own function: an importance function may take
any of the arguments `weight` (C_out, C_in, ...), `name` and `layer`, and returns scores; a schedule function takes the
progress from 0 to 1 and returns the fraction of the rise.

Masked weights have no gradient, are not moved by momentum or weight decay, and stay masked: the masks are nested. Where
masks of an earlier stage have another granularity, or a layer is already sparser, the sparsity is higher than
requested; if the whole network is already sparser, the stage is rejected (except for N:M).

In Zhu and Gupta's method the gradient of a masked weight is zero too, so that it cannot become active again; in `dpf`
it can. With N:M, N of every M consecutive weights along the input channels remain (NVIDIA's sparse tensor cores use
2:4); as in NVIDIA's ASP, layers are not masked if their number of input channels is not a multiple of M. A masked
filter's BatchNorm still outputs a constant. Masks do not change shapes, so runtimes without sparse kernels are not
faster: `channel_pruning` removes channels.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import InputError
from tersor.core.import_path import import_function, is_function_path, named
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import first_batch
from tersor.graph.batchnorm import Norm
from tersor.graph.batchnorm_behind import norms_behind
from tersor.graph.layer_selection import Layer, prunable
from tersor.pruning.topk import Scope, check_granularity, masks, n_of_m, n_of_m_mask, unit_scores
from tersor.pruning.weight_importance import (
    FILTER_IMPORTANCES,
    IMPORTANCES,
    check_loss,
    function_scores,
    geometric_median,
    gradient_products,
    magnitudes,
    random_scores,
    root_mean_squares,
)
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import (
    MaskedAttachment,
    MaskedLayers,
    check_floor,
    dense_weight,
    insert_masks,
    mask_of,
)
from tersor.training.method import PLAIN_VALUES
from tersor.training.schedule import curve

_SCHEDULES = ("one_shot", "linear", "cubic")


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class WeightPruning:
    """Mask the least important weights, kernels or filters, at once or gradually during training."""

    example: ClassVar[dict[str, Any]] = {"sparsity": 0.7, "sparsity_schedule": "cubic", "every": 2}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[
        float | None, Field(ge=0, lt=1, description="fraction of masked weights; default: 0.5, or 1 - N/M for N:M")
    ] = None
    importance: Annotated[
        str,
        AfterValidator(named("importance", IMPORTANCES)),
        Field(description=f"score of a weight: {', '.join(IMPORTANCES)}, or package.module:function"),
    ] = "magnitude"
    granularity: Annotated[
        str,
        AfterValidator(check_granularity),
        Field(description="unit of masking: weight, kernel, filter; or N:M: N of every M consecutive weights remain"),
    ] = "weight"
    scope: Annotated[Scope, Field(description="sparsity of each layer, or of all layers together")] = "layer"
    floor: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="with `scope: global`: fraction of each layer that always remains",
        ),
    ] = 0.0
    sparsity_schedule: Annotated[
        str,
        AfterValidator(named("sparsity_schedule", _SCHEDULES)),
        Field(description=f"how the sparsity rises: {', '.join(_SCHEDULES)}, or package.module:function"),
    ] = "one_shot"
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage over which the sparsity rises")] = 0.75
    every: Annotated[int, Field(ge=1, description="steps between two mask updates")] = 16
    layers: MaskedLayers = ()
    images: Annotated[int, Field(ge=1, description="number of images for `importance: taylor`")] = 512
    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of `importance: random`")] = 0

    @property
    def needs_steps(self) -> bool:
        """Whether the sparsity rises during training."""
        return self.sparsity_schedule != "one_shot"

    @property
    def target(self) -> float:
        """The sparsity at the end."""
        if self.sparsity is not None:
            return self.sparsity
        pattern = n_of_m(self.granularity)
        return 0.5 if pattern is None else 1 - pattern[0] / pattern[1]

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Insert masks of ones. Without a schedule, `begin` sets them; with one, they are updated during training.

        Raises:
            InputError: a pattern that matches nothing, a quantized weight, a network that is sparser already, a
                schedule without steps, parameters that contradict each other or have no effect, a function that does
                not exist, or missing data, targets or BatchNorm that the importance needs.
        """
        layers = prunable(model, self.layers)
        if not self.target:
            return Attachment(model)
        self._check(context.steps)
        if self.importance == "taylor":
            check_loss(context.task, context.data)
        layers, notes = self._divided(layers)
        by_norm = self.importance == "batchnorm"
        norms = norms_behind(model, first_batch(context.data, "importance: batchnorm")) if by_norm else {}
        for name in layers if self.importance == "batchnorm" else ():
            if name not in norms or not norms[name].affine:
                raise InputError(
                    f"importance: batchnorm needs a BatchNorm with a scale after {name}, but there is none. Set "
                    "`layers` to layers that are followed by one, or use another importance: "
                    f"{', '.join(each for each in IMPORTANCES if each != 'batchnorm')}."
                )
        insert_masks(layers, "masked", "weight_pruning")
        return WeightPruningAttachment(self, model, layers, context, norms, notes)

    def _check(self, steps: int) -> None:
        if self.needs_steps and not steps:
            raise InputError(
                f"sparsity_schedule: {self.sparsity_schedule} raises the sparsity during training, but the stage has 0 "
                "steps. Write epochs or steps, or sparsity_schedule: one_shot."
            )
        for name in (self.importance, self.sparsity_schedule):
            if is_function_path(name):
                import_function(name)
        if self.importance in FILTER_IMPORTANCES and self.granularity != "filter":
            raise InputError(f"importance: {self.importance} is defined only for filters. Write granularity: filter.")
        if self.importance == "magnitude_l2" and self.granularity not in ("kernel", "filter"):
            raise InputError(
                "for individual weights, magnitude_l2 gives the same ranking as magnitude. Write importance: magnitude."
            )
        pattern = n_of_m(self.granularity)
        if pattern is not None and self.scope == "global":
            raise InputError(f"with {self.granularity} all layers have the same sparsity. Leave out scope: global.")
        if pattern is not None and not math.isclose(self.target, 1 - pattern[0] / pattern[1]):
            raise InputError(
                f"granularity {self.granularity} fixes the sparsity at {1 - pattern[0] / pattern[1]:g}, but sparsity "
                f"is {self.sparsity:g}. Leave out sparsity."
            )
        if self.floor and self.scope == "layer":
            raise InputError("floor has an effect only with scope: global. Write scope: global, or leave out floor.")
        check_floor(self.floor, self.target)

    def _divided(self, layers: dict[str, Layer]) -> tuple[dict[str, Layer], list[str]]:
        """The layers whose input channels M divides, and a note on the others."""
        pattern = n_of_m(self.granularity)
        if pattern is None:
            return layers, []
        whole = [name for name, layer in layers.items() if layer.weight.shape[1] % pattern[1]]
        if len(whole) == len(layers):
            raise InputError(
                f"{self.granularity} needs layers whose number of input channels is a multiple of {pattern[1]}; there "
                "are none. Write another granularity."
            )
        shown = ", ".join(whole[:6]) + (f" and {len(whole) - 6} more" if len(whole) > 6 else "")
        reason = f"because their number of input channels is not a multiple of {pattern[1]}"
        notes = [f"these layers are not masked, {reason}: {shown}"] if whole else []
        return {name: layer for name, layer in layers.items() if name not in whole}, notes


class WeightPruningAttachment(MaskedAttachment):
    """Nested masks: masked weights stay masked."""

    def __init__(
        self,
        method: WeightPruning,
        model: nn.Module,
        layers: dict[str, Layer],
        context: AttachContext,
        norms: dict[str, Norm],
        notes: list[str],
    ) -> None:
        super().__init__(model, layers, updates=context.steps // method.every, notes=notes)
        self.method = method
        self.data, self.task = context.data, context.task
        self.norms = norms
        self.steps = context.steps
        self.ramp = max(1, round(method.end * context.steps))
        self.start = self.sparsity
        if self.start > method.target and n_of_m(method.granularity) is None:
            raise InputError(
                f"the network already has a sparsity of {self.start:.4f}, and {method.target:g} is requested. Masked "
                "weights stay masked. Write a higher sparsity."
            )
        self.curve = curve(method.sparsity_schedule) if method.needs_steps else None
        self.scheduled_steps = self.steps if self.curve else 0

    def begin(self) -> None:
        """Set the masks, if there is no schedule."""
        if self.curve is None:
            self._mask(self.method.target, 0)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Update the masks every few steps until the final sparsity."""
        super().after_step(step, optimizer)
        done, every = step + 1, self.method.every
        if self.curve is not None and done <= self.ramp and (done % every == 0 or done == self.ramp):
            reached = self.start + (self.method.target - self.start) * self.curve(done / self.ramp)
            last = done == self.ramp
            self._mask(max(self.sparsity, reached), done, 0 if last else done // every)

    def finish(self) -> None:
        """Reach the exact sparsity, no matter how few steps there were."""
        if round(self.sparsity * self.total) < round(self.method.target * self.total):
            self._mask(self.method.target, self.steps)
        super().finish()

    @torch.no_grad()
    def _mask(self, sparsity: float, done: int, number: int = 0) -> None:
        scores = self._scores()
        shapes = {name: dense_weight(layer).shape for name, layer in self.masked.items()}
        pattern = n_of_m(self.method.granularity)
        if pattern is not None:
            kept, of = max(pattern[0], pattern[1] - round(sparsity * pattern[1])), pattern[1]
            updated = {name: n_of_m_mask(each.reshape(shapes[name]), kept, of) for name, each in scores.items()}
        else:
            updated = masks(scores, shapes, sparsity, self.method.scope, self.method.floor)
        nested = {name: mask & mask_of(self.masked[name]).mask for name, mask in updated.items()}
        self.set_masks(nested, done, number)

    def _scores(self) -> dict[str, Tensor]:
        """Layer -> (units,); -inf for units that are masked already."""
        method, by_layer = self.method, dict[str, Tensor]()
        unit = "weight" if n_of_m(method.granularity) else method.granularity
        weights = {name: dense_weight(layer) for name, layer in self.masked.items()}
        products = (
            gradient_products(self.model, weights, self.data, method.images, self.task)
            if method.importance == "taylor"
            else {}
        )
        for number, (name, layer) in enumerate(self.masked.items()):
            scores = self._score(name, weights[name].detach(), unit, number, products)
            by_layer[name] = scores.masked_fill(unit_scores(mask_of(layer).mask.float(), unit) == 0, -torch.inf)
        return by_layer

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
                return random_scores(weight, unit, self.method.seed + number)
            case path:
                return function_scores(path, weight, unit, name=name, layer=self.masked[name])
