"""BatchNorm statistics after a short training run: averaged again over training images.

With momentum m, running statistics after k batches still contain the fraction (1 - m)^k of those before the training.
Training uses batch statistics only. So a well-trained network can have wrong outputs in eval mode. A change of masks
during the training has the same effect; it is weighted by the share of the mask that changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

from tersor.core.errors import counted
from tersor.data.batch import Batch
from tersor.data.batch_source import BatchSource, batches_in
from tersor.graph.batchnorm import Norm
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.training.objective import Objective

_REMAINING = 0.05
"""Largest fraction of earlier statistics that may remain: the sum over all changes of the network."""
_IMAGES = 1024
"""Images to average over, rounded up to batches; at most one epoch."""


def average_again(
    objective: Objective,
    batches: BatchSource,
    place: Callable[[Batch], Batch],
    steps: int,
    accumulate: int = 1,
    changes: Sequence[tuple[int, float]] = (),
) -> Iterator[str]:
    """Average over training images the running statistics whose momentum is too small; yield a line about it.

    Those that are frozen during training (in eval mode, or with momentum 0) stay as they are, and so do those of layers
    that run only in training.

    Args:
        objective: the objective, with the network in training mode.
        batches: the first batches of the first epoch are used.
        place: moves a batch to the device of the network.
        steps: number of training steps.
        accumulate: batches per step.
        changes: changes to the network during training, such as new masks: for each, the number of steps before it and
            the share of the weights that changed.
    """
    done = batches_in(steps, batches, accumulate)
    start, *later = [(done - batches_in(step, batches, accumulate), share) for step, share in [(0, 1.0), *changes]]
    updated = [each for each in objective.model.modules() if isinstance(each, Norm) and _is_updated(each)]
    norms = [each for each in updated if _remaining(each, [start, *later]) > _REMAINING]
    if not norms:
        return
    slow = any(_remaining(each, [start]) > _REMAINING for each in norms)
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
        f"statistics of {counted(len(averaged), 'BatchNorm layer')} recomputed as averages over "
        f"{counted(images, 'training image')}: for a momentum of {momenta}, there were too few batches "
        + (f"({done})" if slow else "after the last changes of the masks")
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


def _is_updated(norm: Norm) -> bool:
    return (
        norm.training and norm.running_mean is not None and norm.num_batches_tracked is not None and bool(norm.momentum)
    )


def _remaining(norm: Norm, changes: Sequence[tuple[int, float]]) -> float:
    """The fraction of the running statistics that is from before the changes, each weighted by its share."""
    assert norm.momentum is not None
    return sum(share * (1 - norm.momentum) ** updates for updates, share in changes)
