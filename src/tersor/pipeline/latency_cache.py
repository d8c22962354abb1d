"""What a run has measured in order to decide. A run that goes on attaches again and must decide the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tersor.core import distributed
from tersor.core.files import replacing
from tersor.core.target import Target
from tersor.evaluation.costs import costs
from tersor.evaluation.latency_protocol import Stopwatch

MEASURED = "measured.json"
"""Beside the checkpoints of a run."""


class Remembering:
    """A stopwatch that asks another one, and keeps what it said in a file: for the same shapes it says it again.

    Of processes that train together the first measures, and all hear its answer.

    Args:
        stopwatch: who measures.
        file: where the answers are, by what was asked; made when there is one.
    """

    def __init__(self, stopwatch: Stopwatch, file: Path) -> None:
        self.stopwatch = stopwatch
        self.file = file

    def against(self, original: nn.Module, example: Tensor, target: Target) -> Callable[[nn.Module], float]:
        """A function: network -> its latency as a fraction of `original`'s, which stays as it is while that is used."""
        if distributed.rank():
            return lambda _network: _from_the_first(0.0)
        asked = [_shapes(original), list(example.shape[1:]), target.model_dump()]
        opened: list[Callable[[nn.Module], float]] = []  # when it is first needed, if it is

        def ratio(network: nn.Module) -> float:
            known = self._known()
            key = hashlib.sha256(json.dumps([*asked, _shapes(network)]).encode()).hexdigest()
            if key not in known:
                opened[:] = opened or [self.stopwatch.against(original, example, target)]
                known[key] = opened[0](network)
                self._write(known)
            return _from_the_first(known[key])

        return ratio

    def _known(self) -> dict[str, float]:
        try:
            return TypeAdapter(dict[str, float]).validate_json(self.file.read_bytes())
        except (FileNotFoundError, ValidationError):  # the latter: damaged, so it is measured anew
            return {}

    def _write(self, known: dict[str, float]) -> None:
        with replacing(self.file) as partial:
            partial.write_text(json.dumps(known))


def _from_the_first(value: float) -> float:
    return float(distributed.all_gather(torch.tensor(value, dtype=torch.float64))[0])


def _shapes(network: nn.Module) -> list[list[object]]:
    """What a latency depends on: not the values."""
    return [[name, list(value.shape)] for name, value in network.state_dict().items()]


class ByMacs:
    """A stand-in that measures nothing, where no more than a rehearsal follows: as if latency went with the MACs."""

    def against(self, original: nn.Module, example: Tensor, target: Target) -> Callable[[nn.Module], float]:
        """A function: network -> its MACs as a fraction of `original`'s."""
        before = costs(original, example).macs
        return lambda network: costs(network, example).macs / before
