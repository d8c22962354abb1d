"""How much each unit of a weight matters, by name: what has the lowest score is masked first.

w (C_out, C_in, ...) is a weight, a unit one of its weights, kernels or filters. Scores are means over a unit, so that
layers with small and with large filters compare.

    magnitude       mean |w|                        Han et al., 2015; Li et al., "Pruning Filters", ICLR 2017
    magnitude_l2    root of the mean w^2, of kernels and filters; of single weights the order would be that of |w|
    taylor          mean |w * dL/dw| over batches   Molchanov et al., CVPR 2019
    batchnorm       |gamma| of the filter's channel Liu et al., "Network Slimming", ICCV 2017
    fpgm            mean distance of a filter to the others of its layer; what lies in their middle can be replaced
                    by them                         He et al., "Filter Pruning via Geometric Median", CVPR 2019
    random          drawn, the same at every time
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tersor.core.errors import InputError
from tersor.core.import_path import call_with, import_function
from tersor.data.batch import images_of, labels_of
from tersor.graph.eval_mode import evaluating
from tersor.pruning.topk import unit_scores

IMPORTANCES = ("magnitude", "magnitude_l2", "taylor", "batchnorm", "fpgm", "random")
OF_FILTERS = ("batchnorm", "fpgm")
"""Those that say nothing of a smaller unit."""


def magnitudes(weight: Tensor, granularity: str) -> Tensor:
    """Mean |w| of each unit, (units,)."""
    return unit_scores(weight.abs(), granularity)


def root_mean_squares(weight: Tensor, granularity: str) -> Tensor:
    """Root of the mean w^2 of each unit, (units,)."""
    return unit_scores(weight.square(), granularity).sqrt()


def geometric_median(weight: Tensor) -> Tensor:
    """Mean distance of each filter to all of its layer, by the root of a filter's weights, (C_out,)."""
    filters = weight.flatten(1)
    far = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
    return far.mean(1) / filters.shape[1] ** 0.5


def drawn(weight: Tensor, granularity: str, seed: int) -> Tensor:
    """Numbers from 0 to 1, (units,)."""
    units = len(unit_scores(torch.empty(weight.shape, device="meta"), granularity))
    return torch.rand(units, generator=torch.Generator().manual_seed(seed)).to(weight.device)


def gradient_products(
    model: nn.Module, weights: Mapping[str, nn.Parameter], data: Iterable[Any] | None, images: int
) -> dict[str, Tensor]:
    """Mean over batches of |w * dL/dw|, as each weight; L is the cross entropy with the labels, in eval mode.

    Args:
        model: the network; gradients that its parameters hold stay, and those may be frozen.
        weights: layer -> its weight.
        data: batches of images (N, C, H, W) with labels (N,).
        images: so many are looked at, at least.

    Raises:
        InputError: there is no data, it is empty, or it has no labels.
    """
    given = "importance: taylor asks how the loss changes"
    if data is None:
        raise InputError(f"{given}, and there is no data. Pass data=... with batches of images and labels.")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    views = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    swapped = {names[id(weight)]: views[name] for name, weight in weights.items()}
    found = {name: torch.zeros_like(view) for name, view in views.items()}
    seen = 0
    with evaluating(model), torch.enable_grad():
        for batch in data:
            labels = labels_of(batch)
            if labels is None:
                raise InputError(f"{given}, and the images have no labels. Pass batches of images and labels.")
            device = next(iter(weights.values())).device
            loss = F.cross_entropy(functional_call(model, swapped, images_of(batch).to(device)), labels.to(device))
            for name, gradient in zip(found, torch.autograd.grad(loss, [*views.values()]), strict=True):
                found[name] += (views[name].detach() * gradient).abs()
            seen += len(labels)
            if seen >= images:
                break
    if not seen:
        raise InputError(f"{given}, and the data is empty. Pass data=... with batches of images and labels.")
    return found


def of_function(path: str, weight: Tensor, granularity: str, *, name: str, layer: nn.Module) -> Tensor:
    """What a user's function gives, (units,): called with those of `weight`, `name` and `layer` that it accepts.

    Raises:
        InputError: it cannot be found, or gives anything but one finite score for each weight or unit.
    """
    found = call_with(path, import_function(path), weight=weight, name=name, layer=layer)
    units = len(unit_scores(torch.empty(weight.shape, device="meta"), granularity))
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape not in (tuple(weight.shape), (units,)):
        raise InputError(
            f"'{path}' gave {shape} for {name}. Give a tensor of the weight's shape {tuple(weight.shape)}, or of one "
            f"score for each {granularity}, ({units},)."
        )
    scores = found.detach().float()
    if not torch.isfinite(scores).all():
        raise InputError(f"'{path}' gave scores for {name} that are not finite. Give numbers.")
    return unit_scores(scores, granularity) if scores.shape == weight.shape else scores
