"""Check that killed runs, and runs whose disk fails, resume to the same bits.

    python bench/kills.py FOLDER [KILLS] [FAULTS]

KILLS (50): send SIGKILL at a random moment of a phase, each phase in turn, then resume in a fresh process. Its
model.safetensors, model.onnx and checkpoints must equal those of an uninterrupted run. FAULTS (20): the disk is full or
read-only from a random write on, or full in the middle of a file. The run must exit with code 2 and one message, leave
nothing half-written, and resume to the same bits. FOLDER/rows.jsonl has a row for each; a restarted driver continues
there.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "laws"))

import killed  # noqa: E402

STEPS = 16


def main() -> None:
    """Read the command line and run what is missing."""
    folder = Path(sys.argv[1]).resolve()
    kills, faults = (int(sys.argv[place]) if sys.argv[place:] else count for place, count in ((2, 50), (3, 20)))
    folder.mkdir(parents=True, exist_ok=True)
    killed.prepare(folder, STEPS)
    expected = killed.whole(folder)
    print({phase: round(seconds, 3) for phase, seconds in expected.seconds.items()}, expected.writes, "writes")
    rows = folder / "rows.jsonl"
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    begun = Counter(row["what"] for row in done)
    for what, count in (("kill", kills), ("fault", faults)):
        for number in range(begun[what], count):
            row = (_kill if what == "kill" else _fault)(folder, expected, number)
            with rows.open("a") as opened:
                opened.write(json.dumps({"what": what, "number": number, **row}) + "\n")
            done.append({"what": what, **row})
            print(what, number, row, flush=True)
    for what in ("kill", "fault"):
        print(what, dict(Counter(row["hit"] for row in done if row["what"] == what)))
    wrong = [row for row in done if row["wrong"]]
    print(f"{len(done)} rows, {len(wrong)} wrong")
    sys.exit(bool(wrong))


def _kill(folder: Path, expected: killed.Whole, number: int) -> dict[str, Any]:
    phase = killed.PHASES[number % len(killed.PHASES)]
    draw, hit, misses = random.Random(f"kill {number}"), "ended", -1  # noqa: S311
    out = folder / f"killed{number}"
    while hit != phase:  # on a less busy machine a phase can end before the chosen moment
        misses += 1
        if hit != "ended":
            killed.require_same(folder, expected, out)
        killed.remove(out)
        hit = killed.kill(folder, out, phase, draw.uniform(0, expected.seconds[phase]) * 0.7**misses)
    return {"hit": hit, "misses": misses, "wrong": _wrong(folder, expected, out)}


def _fault(folder: Path, expected: killed.Whole, number: int) -> dict[str, Any]:
    kind, after = killed.fault_of(expected, random.Random(f"fault {number}"))  # noqa: S311
    out = folder / f"refused{number}"
    killed.remove(out)
    try:
        killed.require_nothing_half_written(out, killed.start(folder, out, kind, after))
    except AssertionError as error:
        return {"hit": kind, "after": after, "wrong": str(error)}
    return {"hit": kind, "after": after, "wrong": _wrong(folder, expected, out)}


def _wrong(folder: Path, expected: killed.Whole, out: Path) -> str:
    try:
        killed.require_same(folder, expected, out)
    except AssertionError as error:
        return str(error) or "other bits"
    return ""


if __name__ == "__main__":
    main()
