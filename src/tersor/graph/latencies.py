"""What channels save of a latency that is measured: not in proportion to what is computed.

Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (HALP), NeurIPS 2022, weigh what is lost by channels
against the latency that they save, looked up for each layer in a table. Here whole networks are timed: all groups
that are alike lose the same number of channels, a few such numbers are tried, and between them the curve is straight.
So what the runtime fuses is in it, and what it takes to hand values on.

A ResNet-56's inner layers of 64 channels in ONNX Runtime on AVX2, which computes 32 of them at once: 56, 48, 40, 32, 24
and 16 channels take 0.93, 0.85, 0.77, 0.53, 0.45 and 0.37 of the time of 64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersor.core.evaluating import evaluating
from tersor.graph.channels import Cut, Group
from tersor.graph.coupling.recording import record
from tersor.graph.widths import Order, Saves, ends

_TRIED = 8
"""Numbers of channels that are tried of groups that are alike, and their branches."""


def saved_latency(
    graph: fx.GraphModule,
    groups: Sequence[Group],
    example: Tensor,
    ratio: Callable[[nn.Module], float],
    *,
    macs: Sequence[float],
    round_to: int,
    floor: float,
    branches: Mapping[int, Cut],
) -> Saves:
    """Number of a group and of channels that are gone -> fraction of the latency that it saves.

    Groups are alike that have as many channels, of values of the same size; what they save together is shared by MACs.

    Args:
        graph: a captured network; it comes back as it was.
        groups: of its channels.
        example: one image (1, C, H, W).
        ratio: network -> its latency as a fraction of `graph`'s.
        macs: of every group what a channel takes.
        round_to, floor, branches: as `ordered` is given.
    """
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    sizes = _sizes(graph, example)
    for number, group in enumerate(groups):
        alike[len(group.slices), group.unit(round_to), sizes.get(group.root)].append(number)
    curves: dict[int, tuple[list[int], list[float]]] = {}
    for (_, unit, _), numbers in alike.items():
        size = len(groups[numbers[0]].slices)
        assert isinstance(unit, int)
        tried, saved = [0], [0.0]
        for gone in _some(ends(size, unit, floor)) + [size] * any(number in branches for number in numbers):
            some = [number for number in numbers if gone < size or number in branches]
            blocks = [(each, gone) for each in some]
            order = Order(groups, [range(len(each.slices)) for each in groups], blocks, branches)
            each = (1 - ratio(order.without(graph, len(some)))) / max(sum(macs[number] for number in some), 1e-9)
            tried.append(gone)
            saved.append(max(saved[-1], each))
        curves |= dict.fromkeys(numbers, (tried, saved))
    return lambda number, gone: macs[number] * float(np.interp(gone, *curves[number]))


def _some(numbers: Sequence[int]) -> list[int]:
    """At most a few of them, as even as may be, and the last."""
    count = min(_TRIED, len(numbers))
    return [numbers[round((step + 1) * len(numbers) / count) - 1] for step in range(count)]


def _sizes(graph: fx.GraphModule, example: Tensor) -> dict[str, int]:
    """Layer -> how many positions (or numbers in one) its value has for an image."""
    with evaluating(graph), torch.no_grad():
        found = record(graph, example.to(next(graph.parameters()).device))
    layers = {node: value for node, value in found.items() if node.op == "call_module" and isinstance(value, tuple)}
    return {str(node.target): int(np.prod(value[2:])) for node, value in layers.items()}
