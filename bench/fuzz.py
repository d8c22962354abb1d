"""Read randomly damaged files and check: no traceback, no hang, no code execution.

    python bench/fuzz.py [INPUTS] [KIND ...]

INPUTS (10,000) are spread over the six kinds of `tests/fuzz/kinds.py`. Every kind is read in a child process, so that a
crash or a hang ends only the child; the driver continues after it. Input number n of a kind is the same in every run.
The script prints its findings and a count for each kind; the exit code is 1 if there was any finding.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FUZZ = ROOT / "tests" / "fuzz"
KINDS = ("recipe", "weights", "image", "checkpoint", "structure", "numbers")
SECONDS = 10
_HUNG = 1  # the exit code of faulthandler


def _read(name: str, first: int, end: int) -> None:
    """In the child: read inputs `first` to `end`, and print a line for each that is neither read nor refused."""
    sys.path[:0] = [str(FUZZ)]
    from kinds import kind
    from mutation import MARKER

    from tersor.core.errors import InputError

    read = kind(name)
    for content in read.seeds:  # torch's imports on first use are not a hang
        with tempfile.TemporaryDirectory() as folder, suppress(InputError):
            read.read(read.mutate(content, random.Random(0)), Path(folder))  # noqa: S311
        with tempfile.TemporaryDirectory() as folder, suppress(InputError):
            read.read(content, Path(folder))
    refused = 0
    for number in range(first, end):
        draw = random.Random(f"{name} {number}")  # noqa: S311
        content = read.mutate(draw.choice(read.seeds), draw)
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(json.dumps({"begun": number}) + "\n")
            sys.stdout.flush()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                read.read(content, Path(folder))
            except InputError:
                refused += 1
            except Exception as error:  # any other exception would have been a traceback
                _tell(number, "traceback", f"{type(error).__name__}: {error}"[:300])
            finally:
                faulthandler.cancel_dump_traceback_later()
        if Path(MARKER).exists():
            _tell(number, "executed", "")
            Path(MARKER).rmdir()
    sys.stdout.write(json.dumps({"refused": refused}) + "\n")


def _tell(number: int, what: str, why: str) -> None:
    sys.stdout.write(json.dumps({"number": number, "what": what, "why": why}) + "\n")
    sys.stdout.flush()


def fuzz(name: str, inputs: int) -> dict[str, int]:
    """Read so many inputs of a kind; return how many were read and refused, and what went wrong."""
    found = {"inputs": inputs, "refused": 0, "traceback": 0, "hang": 0, "crash": 0, "executed": 0}
    first = 0
    while first < inputs:
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), "--child", name, str(first), str(inputs)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{FUZZ}"},
                capture_output=True,
                text=True,
                check=False,
            )
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        begun = [line["begun"] for line in lines if "begun" in line]
        for line in lines:
            if "what" in line:
                found[line["what"]] += 1
                print(name, line)
            found["refused"] += line.get("refused", 0)
        if child.returncode == 0:
            break
        if not begun:
            raise SystemExit(f"{name}: the child did not begin:\n{child.stderr[-3000:]}")
        what = "hang" if child.returncode == _HUNG and "Timeout (" in child.stderr else "crash"
        found[what] += 1
        print(name, {"number": begun[-1], "what": what, "why": child.stderr[-2500:]})
        first = begun[-1] + 1
    return found


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--child"]:
        name, first, end = sys.argv[2:]
        _read(name, int(first), int(end))
        return
    inputs = int(sys.argv[1]) if sys.argv[1:] else 10_000
    names = sys.argv[2:] or KINDS
    shares = [inputs // len(names) + (place < inputs % len(names)) for place in range(len(names))]
    bad = 0
    for name, share in zip(names, shares, strict=True):
        began = time.perf_counter()
        found = fuzz(name, share)
        bad += sum(found[key] for key in ("traceback", "hang", "crash", "executed"))
        print(f"{name}: {found}, {time.perf_counter() - began:.0f} s", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
