"""BatchNorm statistics after a short training: averaged again over training images.

With momentum m, running statistics after k batches still contain the fraction (1 - m)^k of those before the training.
Training uses batch statistics only. So a well-trained network can have wrong outputs in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

from tersor.core.errors import counted
from tersor.data.batch import Batch
from tersor.data.batch_source import BatchSource
from tersor.graph.batchnorm import Norm
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.training.objective import Objective

_REMAINING = 0.05
"""Largest fraction of the statistics before the training that may remain."""
_IMAGES = 1024
"""Images to average over, rounded up to batches; at most one epoch."""


def average_again(
    objective: Objective, batches: BatchSource, updates: int, place: Callable[[Batch], Batch]
) -> Iterator[str]:
    """Average running statistics whose momentum is too small over training images instead; yield a line about it.

    Those that are frozen during training (in eval mode, or with momentum 0) stay as they are, and so do those of layers
    that run only in training.

    Args:
        objective: with the network in training mode.
        batches: the first batches of the first epoch are used.
        updates: number of batches of the training.
        place: moves a batch to the device of the network.
    """
    norms = [each for each in objective.model.modules() if isinstance(each, Norm) and _is_slow(each, updates)]
    if not norms:
        return
    before = [(norm, norm.momentum, [(buffer, buffer.clone()) for buffer in norm.buffers()]) for norm in norms]
    batches.set_epoch(0)
    images, averaged = 0, []
    try:
        images = _average(norms, objective, map(place, islice(batches, len(batches))))
        averaged = [norm for norm in norms if norm.num_batches_tracked]
    finally:  # after an interrupt, none is averaged
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if norm not in averaged:
                for buffer, value in buffers:
                    buffer.copy_(value)
    if not averaged:
        return
    momenta = ", ".join(dict.fromkeys(f"{norm.momentum:g}" for norm in averaged))
    yield (
        f"statistics of {counted(len(averaged), 'BatchNorm layer')} averaged over {counted(images, 'training image')}, "
        f"since their momentum of {momenta} is too small for {updates} batches"
    )


@torch.no_grad()
def _average(norms: Sequence[Norm], objective: Objective, batches: Iterable[Batch]) -> int:
    """Average the statistics of `norms` over batches, all other modules in eval mode; return the number of images."""
    model, images, first = objective.model, 0, 0
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        for batch in batches:
            first = first or len(batch.images)
            if 2 * len(batch.images) < first:  # every batch counts the same, and a small one is noisy
                continue
            with objective.context.autocasting(batch):
                run(model, *objective.context.task.inputs(batch, training=False))
            images += len(batch.images)
            if images >= _IMAGES:
                break
    return images


def _is_slow(norm: Norm, updates: int) -> bool:
    if not norm.training or norm.running_mean is None or norm.num_batches_tracked is None or not norm.momentum:
        return False
    return (1 - norm.momentum) ** updates > _REMAINING
