"""Scores -> exact masks. What is masked is counted in weights, and ties go by index: the later one is masked.

A unit is what a mask keeps or drops as a whole, a weight or a filter. A fraction of them is rounded to a whole number
of weights, so that a sparsity is met exactly; where units are larger than a weight, it is met from above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["weight", "filter"]
Scope = Literal["layer", "global"]


def unit_scores(values: Tensor, granularity: Granularity) -> Tensor:
    """Scores (C_out, ...) of weights -> scores (units,): as they are, or their mean over each filter."""
    return values.flatten() if granularity == "weight" else values.flatten(1).mean(1)


def masks(
    scores: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], sparsity: float, scope: Scope
) -> dict[str, Tensor]:
    """Bool masks (C_out, ...) by layer, False at the units of lowest score; the best unit of a layer always stays.

    Args:
        scores: layer -> (units,), as many as weights or as filters; what has -inf goes first.
        shapes: layer -> shape of its weight.
        sparsity: fraction of the weights that is masked, in each layer or in all together.
        scope: "layer" or "global".
    """
    groups = [[name] for name in scores] if scope == "layer" else [list(scores)]
    found: dict[str, Tensor] = {}
    for names in groups:
        sizes = [shapes[name].numel() // len(scores[name]) for name in names]
        costs = torch.cat([torch.full_like(scores[name], size) for name, size in zip(names, sizes, strict=True)])
        kept = _kept(torch.cat([_with_a_survivor(scores[name]) for name in names]), costs.double(), sparsity)
        for name, part in zip(names, kept.split([len(scores[name]) for name in names]), strict=True):
            shape = shapes[name]
            found[name] = part.reshape(shape) if len(part) == shape.numel() else _of_filters(part, shape)
    return found


def _with_a_survivor(scores: Tensor) -> Tensor:
    """The scores, the best of which is out of reach: a layer without a weight would pass nothing on."""
    best = int(scores.argmax())
    return torch.cat([scores[:best], scores.new_tensor([torch.inf]), scores[best + 1 :]])


def _kept(scores: Tensor, costs: Tensor, sparsity: float) -> Tensor:
    """Bool (units,): all but the units of lowest score that together make `sparsity` of the costs."""
    target = round(sparsity * costs.sum().item())
    lowest_first = scores.flip(0).argsort(stable=True)  # flipped: of two equal ones, the later goes first
    order = len(scores) - 1 - lowest_first
    dropped = int((costs[order].cumsum(0) < target).sum()) + 1 if target else 0
    dropped = min(dropped, int(scores.isfinite().logical_or(scores < 0).sum()))
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    kept[order[:dropped]] = False
    return kept


def _of_filters(kept: Tensor, shape: torch.Size) -> Tensor:
    return kept.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
