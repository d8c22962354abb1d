"""What a device trains fastest in: the data type to autocast to, and how images and filters lie in memory."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's features as Linux names them; none on other systems, where float32 is never wrong.

    `torch.cpu.get_capabilities` says the same, but is younger than torch 2.9.
    """
    facts = Path("/proc/cpuinfo")
    return frozenset(facts.read_text().split()) if facts.exists() else frozenset()


def precision_for(device: torch.device, wanted: Literal["auto", "float32", "bfloat16"]) -> torch.dtype | None:
    """The data type to autocast to on `device`, or None for the model's own.

    `auto` is bfloat16 where there are units for it: AMX or AVX512-BF16 in a CPU; in a GPU, not emulated.
    """
    if wanted == "auto":
        if device.type == "cpu":
            fast = not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})
        else:
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if wanted == "bfloat16" else None


def layout_for(device: torch.device) -> torch.memory_format:
    """channels_last, in which convolutions are faster, but for Apple's GPUs."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """Lays every 4-d tensor of `model` out anew, same Parameter objects; `Module.to` would stumble over 5-d ones."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's mallopt."""


def keep_freed_memory() -> None:
    """From now on this process keeps what it has freed for what it asks for next.

    Every step asks for the same blocks again. glibc gives the large ones back to the system in between, which then
    clears them page by page. A setting of the whole process: it is the command line's to make.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return
    # older ones refuse more than 32 MB; the other threshold alone would do harm
    if libc.mallopt(_MMAP_THRESHOLD, 2**30) or libc.mallopt(_MMAP_THRESHOLD, 2**25):
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def restore_device_and_layout(networks: nn.Module) -> Generator[None]:
    """While `networks` are trained, elsewhere or in another layout; afterwards they are in eval, where and as they lay.

    Whoever goes on with them (calibration, export, safetensors) need not know.
    """
    device = next(networks.parameters()).device
    networks.zero_grad()
    try:
        yield
    finally:
        networks.zero_grad()
        networks.eval().to(device)
        set_layout(networks, torch.contiguous_format)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Generator[None]:
    """Numbers are drawn from `seed`, on the CPU and on `device`, where a GPU is given."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
