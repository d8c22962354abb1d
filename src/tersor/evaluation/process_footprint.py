"""What opening a file costs in time and memory, measured in a process of its own: `bench.footprint` starts it.

`load_ms`: opening the session, everything it optimises included; the median of three, the runtime imported and its
plugins loaded before.

`peak_memory_bytes`: the largest resident memory of the process after the first opening and one run of a batch, less
its resident memory before the file was opened (interpreter, numpy and runtime loaded). So it is what the network adds
to a process that serves: its weights, what the runtime makes of them, the activations of the batch, its threads.

Linux carries `ru_maxrss` over from the process that started this one, so a parent that holds torch would be measured
instead; the high-water mark in /proc belongs to this process alone. Elsewhere `ru_maxrss` serves.
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
    """Milliseconds to open a file, bytes that it adds to the process; see the module for what is counted."""

    load_ms: float
    peak_memory_bytes: int


def measure(
    path: str, runtime: str, precision: str | None, threads: int | None, shape: Sequence[int], dtype: str
) -> Footprint:
    """Measures in this process, which should have done nothing else.

    Raises:
        InputError: as `open_session` and `Session.run` do.
    """
    load_runtime(runtime)
    batch = np.zeros(shape, dtype)
    before = psutil.Process().memory_info().rss

    def opened() -> tuple[Session, float]:
        start = time.perf_counter()
        session = open_session(path, runtime, precision=precision, threads=threads)
        return session, 1000 * (time.perf_counter() - start)

    session, first = opened()
    session.run(batch)
    peak = _peak_bytes()
    del session
    return Footprint(statistics.median([first, *(opened()[1] for _ in range(_LOADS - 1))]), peak - before)


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found, "Linux tells the high-water mark"
        return 1024 * int(found[1])
    import resource  # Linux has better, and Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main() -> None:
    """Answers the question in the first argument, JSON for JSON."""
    try:
        answer = asdict(measure(**json.loads(sys.argv[1])))
    except InputError as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
