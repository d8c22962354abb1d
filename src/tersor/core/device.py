"""Device settings for training: autocast data type, memory layout, random seeds and the allocator."""

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
    """The processor's features as Linux names them; empty on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split()) if cpuinfo.exists() else frozenset()


def precision_for(device: torch.device, precision: Literal["auto", "float32", "bfloat16"]) -> torch.dtype | None:
    """Return the data type to autocast to on `device`, or None for the model's own.

    `auto` is bfloat16 if the hardware computes in it: a CPU with AMX or AVX512-BF16, or a GPU that need not emulate it.
    """
    if precision == "auto":
        if device.type == "cpu":
            fast = not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})
        else:
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bfloat16" else None


def layout_for(device: torch.device) -> torch.memory_format:
    """Return channels_last, in which convolutions are faster; for Apple's GPUs, contiguous_format."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """Set the memory layout of every 4-d tensor and keep the Parameter objects; `Module.to` fails for 5-d tensors."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Make this process keep freed memory for later allocations.

    Every step allocates the same blocks. By default, glibc returns large blocks to the system after each step, which
    then clears them page by page. The setting affects the whole process, so only the command line makes it.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return
    # older versions accept 32 MB at most; the trim threshold alone would do harm
    if libc.mallopt(_MMAP_THRESHOLD, 2**30) or libc.mallopt(_MMAP_THRESHOLD, 2**25):
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def restore_device_and_layout(networks: nn.Module) -> Generator[None]:
    """Restore the device and the contiguous layout of `networks` after training, and set them to eval mode."""
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
    """Draw random numbers from `seed` on the CPU and, if it is a GPU, on `device`; then restore the generators."""
    gpu = device if device is not None and device.type == "cuda" else None
    with torch.random.fork_rng(devices=[gpu] if gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs
        if gpu:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
