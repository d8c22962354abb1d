"""Load time and memory of a model file, measured in a process of its own, which `latency.footprint` starts.

`load_ms`: time to open the session, graph optimization included; the median of three, with the runtime already loaded.

`peak_memory_bytes`: peak resident memory after the first opening and one run of a batch, minus the resident memory
before (interpreter, numpy and runtime loaded). This is what the network adds to a serving process: weights, the
runtime's copies of them, the activations of the batch, threads.

On Linux, `ru_maxrss` is inherited from the parent process, which may have torch loaded; the high-water mark in /proc
belongs to this process alone. Other systems use `ru_maxrss`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from tersor.core.errors import InputError
from tersor.evaluation.session import Session, load_runtime, open_session

_LOADS = 3


@dataclass(frozen=True)
class Footprint:
    """Milliseconds to open a file, and bytes that it adds to the process, as the module defines them."""

    load_ms: float
    peak_memory_bytes: int


def measure(
    path: str, runtime: str, precision: str | None, threads: int | None, shape: Sequence[int], dtype: str
) -> Footprint:
    """Measure in this process, which should have done nothing else.

    Raises:
        InputError: as `open_session` and `Session.run` do.
    """
    load_runtime(runtime)
    batch = np.zeros(shape, dtype)
    before = psutil.Process().memory_info().rss

    def timed_open() -> tuple[Session, float]:
        start = time.perf_counter()
        session = open_session(path, runtime, precision=precision, threads=threads)
        return session, 1000 * (time.perf_counter() - start)

    session, first = timed_open()
    session.run(batch)
    peak = _peak_bytes()
    del session
    return Footprint(statistics.median([first, *(timed_open()[1] for _ in range(_LOADS - 1))]), peak - before)


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert match, "Linux reports the high-water mark"
        return 1024 * int(match[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main() -> None:
    """Measure the file of the JSON in the first argument, and print the result as JSON."""
    try:
        result = asdict(measure(**json.loads(sys.argv[1])))
    except InputError as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
