"""Weights that a method draws for parts of its own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Numbers are drawn from `seed`; the caller's generator goes on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
