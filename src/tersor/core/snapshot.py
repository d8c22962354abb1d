"""Everything that a training at some step is, as tensors by name; and back, so that it goes on as if never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tersor.core.objective import Objective
from tersor.core.running_mean import RunningMean


def snapshot(objective: Objective, optimizer: Optimizer, mean: RunningMean | None) -> dict[str, Tensor]:
    """Copies, on the CPU: weights and buffers of model and terms, the optimizer's state, means, random numbers.

    The teacher does not change, and is left out. The step is what the loop says.
    """
    tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in objective.model.state_dict().items()}
    tensors |= {f"terms.{key}": value for key, value in objective.terms.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    if mean is not None:
        tensors |= {f"mean.{key}": value for key, value in mean.values.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
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
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # noqa: PLW2901 - in its layout
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
