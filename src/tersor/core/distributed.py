"""Which of several processes this is, and how they come to hold the same.

`accelerate launch` starts them. Where there is only one, nothing here does anything. What is said here goes over the
processors, by a group of gloo's own that waits as long as the first process measures; gradients go their own way.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from tersor.core.errors import ProcessLost

_LONGEST = timedelta(days=2)
_LOST = re.compile(r"gloo|connection (?:closed|reset|refused)|broken pipe|NCCL", re.IGNORECASE)


def init_process_group() -> bool:
    """Joins the processes that `accelerate launch` started, once; whether they train on processors.

    accelerate takes gloo for them only where it is told so: without, it would train each on its own.
    """
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    PartialState(cpu=cpu)
    return cpu


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0. The first alone writes files, measures, and talks."""
    return dist.get_rank() if count() > 1 else 0


@cache
def _group() -> dist.ProcessGroup:
    made = dist.new_group(backend="gloo", timeout=_LONGEST)
    assert isinstance(made, dist.ProcessGroup)
    return made


@contextmanager
def others_alive() -> Generator[None]:
    """While something is exchanged with the other processes.

    Where one dies, its connections close, and gloo or NCCL raise in the others at once.

    Raises:
        ProcessLost: one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise ProcessLost(
            f"another of the {count()} processes that train together has died or cannot be reached, so process "
            f"{rank()} ends. Its own message tells why. To go on from the last checkpoint, start all of them again "
            "with --resume."
        ) from error


def barrier() -> None:
    """Waits until all have come here."""
    if count() > 1:
        with others_alive():
            dist.barrier(_group())


@torch.no_grad()
def broadcast_from_rank0(module: nn.Module) -> None:
    """Gives `module` the parameters, buffers and extra state that it has in the first process."""
    if count() == 1:
        return
    state = module.state_dict()
    for name, value in state.items():
        whole = value.cpu().contiguous()
        with others_alive():
            dist.broadcast(whole, src=0, group=_group())
        state[name] = whole
    module.load_state_dict(state)


def any_rank(here: bool) -> bool:
    """Whether it is so in any process."""
    if count() == 1:
        return here
    flag = torch.tensor(int(here))
    with others_alive():
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=_group())
    return bool(flag)


def all_gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every process, on this one's device; it has the same shape in all."""
    if count() == 1:
        return [tensor]
    here = tensor.cpu().contiguous()
    everyone = [torch.empty_like(here) for _ in range(count())]
    with others_alive():
        dist.all_gather(everyone, here, group=_group())
    return [each.to(tensor.device) for each in everyone]
