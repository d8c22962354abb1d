"""Everything that a training at some step is, as tensors by name; and back, so that it goes on as if never stopped."""

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
from tersor.training.ema import RunningMean
from tersor.training.objective import Objective

_OF_ADAMW, _OF_SGD = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}


class Keeper(Protocol):
    """Keeps a training, so that it can go on.

    Attributes:
        every: steps between two snapshots.
        resume_state: steps that were done before, and the snapshot after them; None at the beginning.
        last: what to call the newest snapshot, to be named where a loss is not finite.
    """

    every: int
    resume_state: tuple[int, Mapping[str, Tensor]] | None

    @property
    def last(self) -> str | None: ...

    def keep(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes the snapshot after `step` steps."""
        ...


@contextmanager
def fitting(checkpoint: str | None) -> Generator[None]:
    """While values of a checkpoint are taken back, which may be a stranger's, or of another version.

    Raises:
        InputError: they do not fit what they are taken back into.
    """
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the checkpoint {checkpoint} is not of this run: {str(error)[:300]}. Remove the folder that it lies in, "
            "and begin anew."
        ) from error


@contextmanager
def defer_sigint(heeded: bool) -> Generator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, to be asked between two steps; pressed twice, it interrupts at once.

    A step that is cut in two leaves half of the weights moved. Nothing changes where it is not `heeded`, or outside
    of the main thread.
    """
    pressed: list[bool] = []
    if not heeded or threading.current_thread() is not threading.main_thread():
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


def snapshot(objective: Objective, optimizer: Optimizer, mean: RunningMean | None) -> dict[str, Tensor]:
    """Copies, on the CPU: weights and buffers of model and terms, the optimizer's state, means, random numbers.

    The teacher does not change, and is left out. The step is what the loop says. All processes ask for it together:
    each has random numbers of its own.
    """
    tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in objective.model.state_dict().items()}
    tensors |= {f"terms.{key}": value for key, value in objective.terms.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    if mean is not None:
        tensors |= {f"mean.{key}": value for key, value in mean.values.items()}
    tensors |= {f"random.cpu{rank}": state for rank, state in enumerate(all_gather(torch.get_rng_state()))}
    if torch.cuda.is_available():
        states = all_gather(torch.cuda.get_rng_state())
        tensors |= {f"random.cuda{rank}": state for rank, state in enumerate(states)}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def part(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of one kind ("model"), by their names within it."""
    return {name.removeprefix(f"{kind}."): value for name, value in tensors.items() if name.startswith(f"{kind}.")}


def restore(
    tensors: Mapping[str, Tensor], objective: Objective, optimizer: Optimizer, mean: RunningMean | None
) -> None:
    """Takes back what `snapshot` gave, in the memory layout that is there: sums then come in the same order."""
    objective.model.load_state_dict(part(tensors, "model"))
    objective.terms.load_state_dict(part(tensors, "terms"))
    _restore_optimizer(optimizer, part(tensors, "optimizer"))
    if mean is not None:
        for key, value in part(tensors, "mean").items():
            mean.values[key].copy_(value)
    random = part(tensors, "random")
    here = rank()
    begun = sum(name.startswith("cpu") for name in random)
    if begun != count():
        raise InputError(
            f"the run was begun by {begun} processes, and goes on with {count()}. Start as many as before."
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
            raise ValueError(f"{key} of parameter {index} has another shape than the parameter")
        states.setdefault(int(index), {})[key] = value
    kept = _OF_ADAMW if isinstance(optimizer, AdamW) else _OF_SGD
    if any(set(state) != kept for state in states.values()):
        raise ValueError("the optimizer's state is that of another one")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
