"""A cache of measured latencies. A resumed run attaches its methods again, and has to make the same decisions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from tersor.core import distributed
from tersor.core.files import replacing
from tersor.core.target import Target
from tersor.data.network_inputs import NetworkInput
from tersor.training.context import LatencyRatio

FILE = "latencies.json"
"""Name of the file with the measured ratios, beside the checkpoints of a run."""


class CachedLatencyRatio:
    """Measures each pair of networks once: for the same shapes, the ratio is read from a file.

    With several processes, the first one measures and broadcasts the ratio.

    Args:
        measure: measures the latency ratio of two networks.
        file: JSON file with the measured ratios; created with the first one.
    """

    def __init__(self, measure: LatencyRatio, file: Path) -> None:
        self.measure = measure
        self.file = file

    def __call__(self, original: nn.Module, example: NetworkInput, target: Target) -> Callable[[nn.Module], float]:
        """A function of a network: its latency divided by that of `original`."""
        if distributed.rank():
            return lambda _network: _from_rank0(0.0)
        compared = [_shapes(original), list(example.shape[1:]), target.model_dump()]
        measure = cache(lambda: self.measure(original, example, target))  # exports the original once, if it is needed

        def ratio(network: nn.Module) -> float:
            cached = self._read()
            key = hashlib.sha256(json.dumps([*compared, _shapes(network)]).encode()).hexdigest()
            if key not in cached:
                cached[key] = measure()(network)
                self._write(cached)
            return _from_rank0(cached[key])

        return ratio

    def _read(self) -> dict[str, float]:
        try:
            return TypeAdapter(dict[str, float]).validate_json(self.file.read_bytes())
        except (FileNotFoundError, ValidationError):  # a damaged file: measure again
            return {}

    def _write(self, cached: dict[str, float]) -> None:
        with replacing(self.file) as partial:
            partial.write_text(json.dumps(cached))


def _from_rank0(value: float) -> float:
    return float(distributed.all_gather(torch.tensor(value, dtype=torch.float64))[0])


def _shapes(network: nn.Module) -> list[list[object]]:
    """What a latency depends on: shapes, not values."""
    return [[name, list(value.shape)] for name, value in network.state_dict().items()]
