"""The whole state of a training run as named tensors, and its exact restoration: a resumed run is bit-identical."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from tersor.core.distributed import all_gather, count, rank
from tersor.core.errors import InputError
from tersor.training.ema import WeightEMA
from tersor.training.objective import Objective

_ADAMW_STATE, _SGD_STATE = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}


class Checkpointer(Protocol):
    """Stores snapshots of a training run, from which it resumes.

    Attributes:
        every: steps between two snapshots.
        resume_state: number of finished steps and the snapshot after them; None for a new training run.
        last: name of the newest checkpoint, for error messages.
    """

    every: int
    resume_state: tuple[int, Mapping[str, Tensor]] | None

    @property
    def last(self) -> str | None: ...

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the snapshot after `step` steps."""
        ...


@contextmanager
def restoring(checkpoint: str | None) -> Generator[None]:
    """Context that restores values of a checkpoint, which may belong to another run or version.

    Raises:
        InputError: they do not fit.
    """
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the checkpoint {checkpoint} does not belong to this run: {str(error)[:300]}. Remove the folder that "
            "contains it, and start again."
        ) from error


@contextmanager
def defer_sigint(enabled: bool) -> Generator[Callable[[], bool]]:
    """Defer Ctrl-C to the end of a step; the yielded function returns whether it was pressed.

    An interrupted step would leave half of the weights updated. A second Ctrl-C interrupts at once. Nothing is deferred
    if not `enabled`, or outside of the main thread.
    """
    pressed: list[bool] = []
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def press(_signal: int, _frame: FrameType | None) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def snapshot(objective: Objective, optimizer: Optimizer, ema: WeightEMA | None) -> dict[str, Tensor]:
    """Copies on the CPU: weights and buffers of model and terms, optimizer state, weight averages, random state.

    The teacher does not change and is left out. All processes call this together, since each has its own random state.
    """
    tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in objective.model.state_dict().items()}
    tensors |= {f"terms.{key}": value for key, value in objective.terms.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    if ema is not None:
        tensors |= {f"ema.{key}": value for key, value in ema.averages.items()}
    tensors |= {f"random.cpu{rank}": state for rank, state in enumerate(all_gather(torch.get_rng_state()))}
    if torch.cuda.is_available():
        states = all_gather(torch.cuda.get_rng_state())
        tensors |= {f"random.cuda{rank}": state for rank, state in enumerate(states)}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, by the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def restore(tensors: Mapping[str, Tensor], objective: Objective, optimizer: Optimizer, ema: WeightEMA | None) -> None:
    """Load a `snapshot` into the existing memory layout, so that sums are computed in the same order."""
    objective.model.load_state_dict(with_prefix(tensors, "model"))
    objective.terms.load_state_dict(with_prefix(tensors, "terms"))
    _restore_optimizer(optimizer, with_prefix(tensors, "optimizer"))
    if ema is not None:
        for key, value in with_prefix(tensors, "ema").items():
            ema.averages[key].copy_(value)
    random = with_prefix(tensors, "random")
    here = rank()
    processes = sum(name.startswith("cpu") for name in random)
    if processes != count():
        raise InputError(
            f"the number of processes was {processes} when the run was started, and is {count()} now. Resume the run "
            "with the same number."
        )
    torch.set_rng_state(random[f"cpu{here}"])
    if f"cuda{here}" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random[f"cuda{here}"])


def _restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif value.ndim:
            raise ValueError(f"{key} of parameter {index} has a different shape from the parameter")
        states.setdefault(int(index), {})[key] = value
    expected = _ADAMW_STATE if isinstance(optimizer, AdamW) else _SGD_STATE
    if any(set(state) != expected for state in states.values()):
        raise ValueError("the optimizer state belongs to another optimizer")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
