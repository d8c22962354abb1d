"""Numbers that are drawn from a seed, while the caller's go on as if nothing had been drawn."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Generator[None]:
    """Numbers are drawn from `seed`, on the CPU and on `device`, where a GPU is given."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
