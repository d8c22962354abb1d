"""Communication between the processes of a distributed run, which `accelerate launch` starts.

With one process, nothing here has an effect. Messages use a gloo group of their own; gradients use the default group.
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

_TIMEOUT = timedelta(days=2)
"""The first process evaluates all test images in the runtime, for every stage, while the others wait: hours for large
sets. A process that dies is noticed at once; one that hangs in training, by the timeout of the default group.
"""
_LOST = re.compile(r"gloo|connection (?:closed|reset|refused)|broken pipe|NCCL", re.IGNORECASE)


def init_process_group() -> bool:
    """Join the processes that `accelerate launch` started, and return whether they train on CPUs.

    accelerate needs the argument `cpu` to choose gloo; otherwise each process would train alone.
    """
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    PartialState(cpu=cpu)
    return cpu


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0. Only process 0 writes files, measures and reports."""
    return dist.get_rank() if count() > 1 else 0


@cache
def _group() -> dist.ProcessGroup:
    made = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert isinstance(made, dist.ProcessGroup)
    return made


@contextmanager
def others_alive() -> Generator[None]:
    """Wrap communication with the other processes; if one dies, gloo or NCCL raises an error at once.

    Raises:
        ProcessLost: another process has died or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise ProcessLost(
            f"another of the {count()} processes has died or cannot be reached, so process {rank()} ends too. The "
            "process that failed first prints the reason. To continue from the last checkpoint, start all of them "
            "again with resume=True (`--resume`)."
        ) from error


def barrier() -> None:
    """Wait until every process has reached this call."""
    if count() > 1:
        with others_alive():
            dist.barrier(_group())


@torch.no_grad()
def broadcast_from_rank0(module: nn.Module) -> None:
    """Set the parameters, buffers and extra state of `module` to those of process 0."""
    if count() == 1:
        return
    state = module.state_dict()
    for name, value in state.items():
        received = value.cpu().contiguous()
        with others_alive():
            dist.broadcast(received, src=0, group=_group())
        state[name] = received
    module.load_state_dict(state)


def any_rank(condition: bool) -> bool:
    """Whether the condition holds in any process."""
    if count() == 1:
        return condition
    flag = torch.tensor(int(condition))
    with others_alive():
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=_group())
    return bool(flag)


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensor of every process, on the device of `tensor`. All have the same shape."""
    if count() == 1:
        return [tensor]
    here = tensor.cpu().contiguous()
    everyone = [torch.empty_like(here) for _ in range(count())]
    with others_alive():
        dist.all_gather(everyone, here, group=_group())
    return [each.to(tensor.device) for each in everyone]
