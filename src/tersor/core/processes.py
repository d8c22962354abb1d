"""Which of several processes this is, and how they come to hold the same.

`accelerate launch` starts them. Where there is only one, nothing here does anything.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0. The first alone writes files, measures, and talks."""
    return dist.get_rank() if count() > 1 else 0


def barrier() -> None:
    """Waits until all have come here."""
    if count() > 1:
        dist.barrier()


@torch.no_grad()
def as_in_the_first(module: nn.Module) -> None:
    """Gives `module` the parameters, buffers and extra state that it has in the first process."""
    if count() == 1:
        return
    state = module.state_dict()
    for name, value in state.items():
        whole = value.contiguous()
        dist.broadcast(whole, src=0)
        state[name] = whole
    module.load_state_dict(state)


def any_of(here: bool) -> bool:
    """Whether it is so in any process."""
    if count() == 1:
        return here
    flag = torch.tensor(int(here))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def gathered(tensor: Tensor) -> list[Tensor]:
    """The tensor of every process, which has the same shape in all."""
    if count() == 1:
        return [tensor]
    everyone = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(everyone, tensor)
    return everyone
