"""Shared by all benchmarks: rows of results, the machine they come from, and one benchmark at a time.

A file of results is a list of rows. A row names what was measured (its identity), the numbers with n and spread, and
their origin: command, commit, seeds, machine, date. `python bench/rows.py wait` returns when no benchmark is running.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Row = dict[str, Any]


_UNITS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Instruction sets for low-precision products: timings depend on them, and the processor's name hides them."""


def machine() -> Row:
    """Return the processor, its instruction sets, usable cores, threads, and versions that a timing depends on."""
    import torch  # `wait` does not need torch

    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return {
        "units": [unit for unit in _UNITS if unit in " ".join(lines).split()],
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }


@cache
def commit() -> str:
    """Return the commit at the start of the benchmark; `+` means that files under src/ or bench/ differed from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    changes = [*git, "status", "--porcelain", "--", "src", "bench", ":!bench/results"]
    changed = subprocess.run(changes, capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def command() -> str:
    """Return the command line, relative to the root of the checkout."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return shlex.join(["python", str(script), *sys.argv[1:]])


def read(name: str) -> list[Row]:
    """Return the rows of `bench/results/NAME.json`."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def known(name: str, identity: Mapping[str, Any], *, anywhere: bool = False) -> bool:
    """Return whether a row of this identity exists for such a machine and these versions, or `anywhere`."""
    return any(_same(row, identity, row["machine"] if anywhere else machine()) for row in read(name))


def add(name: str, identity: Mapping[str, Any], numbers: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Write one row, replacing an older one of the same identity and machine.

    Args:
        name: name of the file of results.
        identity: what was measured; plain JSON values.
        numbers: the results, including `n` and `spread`.
        seeds: seeds of everything that was drawn.
    """
    assert {"n", "spread"} <= set(numbers), "a number without n and spread is no evidence"
    here = machine()
    origin = {
        "command": command(),
        "commit": commit(),
        "seeds": list(seeds),
        "machine": here,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with FileLock(_of_this_user(f"-{name}")):
        rows = [row for row in read(name) if not _same(row, identity, here)]
        rows.append({**identity, **numbers, **origin})
        with tempfile.NamedTemporaryFile("w", dir=RESULTS, suffix=".part", delete=False) as part:
            part.write(json.dumps(rows, indent=1) + "\n")
        Path(part.name).chmod(0o644)
        Path(part.name).replace(RESULTS / f"{name}.json")


def _same(row: Row, identity: Mapping[str, Any], here: Row) -> bool:
    return row["machine"] == here and all(row.get(key) == value for key, value in identity.items())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the 10th and the 90th percentile."""
    if len(values) < 2:
        return {"p10": values[0], "p90": values[0]}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p10": tenths[0], "p90": tenths[-1]}


@contextmanager
def alone() -> Generator[None]:
    """Wait until no other benchmark of this user runs, and make others wait until the context ends."""
    with _locked():
        commit()  # read now: the checkout may change within hours
        yield


@contextmanager
def _locked() -> Generator[None]:
    lock = FileLock(_of_this_user(""))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("waiting for another benchmark to finish", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _of_this_user(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"tersor-bench-{os.getuid()}{name}.lock"


if __name__ == "__main__":
    if sys.argv[1:] != ["wait"]:
        sys.exit("usage: python bench/rows.py wait")
    with _locked():
        pass
