"""What a measurement depends on: the processor, its cores and instruction sets, and versions. Needs no torch."""

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
    """The physical cores that this process may use, or fewer where OMP_NUM_THREADS says so."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def machine() -> dict[str, Any]:
    """What a measurement depends on: processor, cores, instruction sets, versions. Names neither host nor user."""
    name, flags = _processor()
    return {
        "cpu": name,
        "cpu_kind": cpu_kind(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": default_threads(),
        "instruction_sets": [wanted for wanted in _INSTRUCTION_SETS if wanted in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: installed_version(package) for package in (*get_args(Runtime), "torch")},
    }


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, frozenset[str]]:
    """Name and instruction sets."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        pairs = [line.partition(":") for line in facts.read_text().splitlines()]
        told = {key.strip(): value.strip() for key, _, value in pairs}
        flags = told.get("flags", told.get("Features", ""))
        return told.get("model name", platform.machine()), frozenset(flags.split())
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return answer.stdout.strip() or platform.machine(), frozenset()
    return platform.processor() or platform.machine(), frozenset()
