"""Describe the machine of a measurement: processor, cores, instruction sets, versions. Does not import torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, get_args

import psutil

from tersor.core.target import Runtime, cpu_kind

_INSTRUCTION_SETS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def default_threads() -> int:
    """Return the number of physical cores that this process may use, limited by OMP_NUM_THREADS."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


def machine() -> dict[str, Any]:
    """Return processor, cores, instruction sets and versions; neither host nor user name."""
    cpu, flags = _processor()
    return {
        "cpu": cpu,
        "cpu_kind": cpu_kind(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": default_threads(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: installed_version(package) for package in (*get_args(Runtime), "torch")},
    }


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, frozenset[str]]:
    """Name and instruction sets of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        flags = fields.get("flags", fields.get("Features", ""))
        return fields.get("model name", platform.machine()), frozenset(flags.split())
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return result.stdout.strip() or platform.machine(), frozenset()
    return platform.processor() or platform.machine(), frozenset()
