"""`tersor compress` on a trained ResNet-56: what is gained over the fastest free baseline within a budget.

    budget    a drop, a time and a seed: accuracy of `model.onnx` on the test images, its size, and its latency against
              float32 and default precision in both runtimes, `quantize_static` and NNCF, interleaved
    kill      a search on the digits is killed at random moments and the same command is repeated: whether `model.onnx`
              is valid and never worse than before, and whether a finished training was repeated

The ResNet-56 was trained on all training images, so half of the test images choose, and the other half is for the
results: `accuracy` and `lost` are those of the other half.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table

import peers
import rows
import tables
import tersor
from images import SHARED, TRAINED, folder
from tersor.core.target import Runtime
from tersor.data import Batches, load
from tersor.deploy.onnx import export
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.session import Session, open_session
from tersor.models import build, save_weights
from tersor.search.compression_budget import Budget
from tersor.search.folder import read_front
from tersor.search.front import rank
from tersor.search.result import Result
from tersor.training.attachment import Attachment
from tersor.training.loop import fit
from tersor.training.options import Training

RESULT = "compress"
OURS = "tersor"
SUBJECT = TRAINED["resnet56"]
WEIGHTS = SHARED / "models" / "resnet56-cifar10-jpeg.safetensors"
BATCHES = (1, 128)
SECONDS = 20.0


class Progress:
    """Prints the lines of the search."""

    def start(self, task: str, total: int) -> None:
        """Do nothing."""

    def advance(self, items: int = 1, **values: float) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)


def measure_budget(drop: float, minutes: float, runtime: Runtime, seed: int) -> None:
    """Search, and write a row of the metric and one of each latency ratio."""
    identity = {"drop": drop, "minutes": minutes, "runtime": runtime, "seed": seed, "model": SUBJECT.name}
    if rows.known(RESULT, {"kind": "budget", **identity}):
        return
    out = folder().parent / "compress" / f"drop{drop:g}-{minutes:g}min-{runtime}-{seed}"
    out.parent.mkdir(exist_ok=True)
    budget = Budget(max_drop=drop, minutes=minutes)
    result = tersor.compress(
        SUBJECT.name, folder(), weights=WEIGHTS, budget=budget, runtime=runtime, seed=seed, out=out, progress=Progress()
    )
    numbers = {"accuracy": result.best.point.test, **outcome(result), "front": len(result.front)}
    for name, batch, ratio in _ratios(result.best.file, runtime):
        tables.add_ratio(RESULT, {"kind": "ratio", "pair": f"{name} / {OURS}", "batch": batch, **identity}, ratio, {})
    rows.add(RESULT, {"kind": "budget", **identity}, numbers, [seed])


def outcome(result: Result) -> dict[str, Any]:
    """What a search found: the loss on the test images, the size, the network, and the time used."""
    best, original = result.best.point, result.numbers.point(result.numbers.original)
    assert best.test is not None
    assert original.test is not None
    return {
        "lost": original.test - best.test,
        "smaller": original.bytes / best.bytes,
        "network": best.description,
        "met": result.numbers.met,
        "minutes_used": result.numbers.minutes_used,
        "n": 1,
        "spread": rows.spread([best.test]),
    }


def _ratios(file: Path, runtime: Runtime) -> Sequence[tuple[str, int, Any]]:
    """The latency of each free way to run the original over that of `file`, by name and batch size."""
    images = SUBJECT.calibration(0)
    with tempfile.TemporaryDirectory() as scratch:
        float32 = export(SUBJECT.network(), images, Path(scratch) / "fp32.onnx")
        static, nncf = Path(scratch) / "static.onnx", Path(scratch) / "nncf.xml"
        peers.onnxruntime_static(float32, images, static)
        peers.nncf_post_training(float32, images, nncf)
        openers: dict[str, Callable[[], Session]] = {OURS: partial(open_session, file, runtime)}
        for each in ("onnxruntime", "openvino"):
            openers[f"float32, {each}"] = partial(open_session, float32, each, precision="float32")
            openers[f"default precision, {each}"] = partial(open_session, float32, each)
        openers["quantize_static"] = partial(open_session, static, "onnxruntime")
        openers["NNCF"] = partial(open_session, nncf, "openvino")
        others = [name for name in openers if name != OURS]
        timings = measure_latency(
            openers,
            np.ascontiguousarray(images[:1].numpy()),
            BATCHES,
            ratios=lambda timed, size: [timed.ratio(timed.fastest(others, size), OURS, size)],
            seconds=SECONDS,
        )
    return [(name, size, timings.ratio(name, OURS, size)) for size in BATCHES for name in others]


def _digits_network(path: Path) -> None:
    """Train a ResNet-20 on the digits for a few seconds, and write its weights."""
    torch.manual_seed(0)
    network, digits = build("resnet20", 10), load(name="digits")
    options = Training(batch_size=64)
    batches = Batches(digits.train, 64, mean=digits.mean or (), std=digits.std or (), shuffle=True)
    fit(Attachment(network), batches, options, steps=200)
    save_weights(network, path)


def _used(out: Path) -> float:
    """Seconds that a search has used, as last written."""
    file = out / "search.json"
    return json.loads(file.read_text())["used"] if file.is_file() else 0.0


def kill(times: int, minutes: float, seed: int) -> None:
    """Kill a search `times` times at random moments, and let it end; write one row."""
    identity = {"kind": "kill", "times": times, "minutes": minutes, "seed": seed, "model": "resnet20, digits"}
    if rows.known(RESULT, identity):
        return
    draw = random.Random(seed)  # noqa: S311
    invalid = worse = repeated = 0
    phases: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        out, weights = Path(scratch) / "out", Path(scratch) / "digits.safetensors"
        _digits_network(weights)
        command = [sys.executable, "-m", "tersor", "compress", "resnet20", "--weights", str(weights), "--data"]
        command += ["digits", "--max-drop", "2", "--time", f"{minutes:g}m", "--out", str(out)]
        before: tuple[float, ...] | None = None
        finished: set[tuple[str, int]] = set()
        moments = sorted(draw.uniform(0, 57 * minutes) for _ in range(times))
        for moment in [*moments, None]:
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while moment is not None and child.poll() is None and _used(out) < moment:
                time.sleep(0.5)
            if moment is not None:
                time.sleep(draw.uniform(0, 10))  # the used time is written every 10 s
                child.kill()
            child.wait()
            if not (out / "front.json").is_file():
                phases.append("start")
                continue
            state = json.loads((out / "search.json").read_text())
            phases.append(f"rung {len(state['rungs'])}" if state["rungs"] else "survey")
            print(phases[-1], f"{state['used']:.0f} s", flush=True)
            onnx.checker.check_model(str(out / "model.onnx"))
            front = read_front(out)
            now = rank(front.point(front.best), Budget(max_drop=2), front.point(front.original).validation)
            if before is not None and now > before:
                worse += 1
                print(f"worse: {front.best}, {before} -> {now}", flush=True)
            invalid += not open_session(out / "model.onnx", "onnxruntime").outputs
            before = now
            points = [json.loads(file.read_text()) for file in out.glob("points/*/numbers.json")]
            names = {(point["name"], point["steps"]) for point in points if point["steps"]}
            repeated += len(finished - names)  # a repeated training makes another number of steps
            finished = names
    numbers = {"invalid": invalid, "worse": worse, "repeated": repeated, "killed_in": phases[:-1], "n": times,
               "spread": rows.spread([0.0])}  # fmt: skip
    rows.add(RESULT, identity, numbers, [seed])


def show() -> None:
    """Print the rows of this machine."""
    found = [row for row in rows.read(RESULT) if row["machine"] == rows.machine()]
    console = Console(width=170)
    table = Table("drop", "minutes", "runtime", "seed", "network", "accuracy", "lost", "smaller", "met", "minutes used")
    for row in [row for row in found if row["kind"] == "budget"]:
        numbers = [f"{row[key]:.2f}" for key in ("accuracy", "lost", "smaller")]
        asked = [f"{row['drop']:g}", f"{row['minutes']:g}", row["runtime"], str(row["seed"]), row["network"]]
        table.add_row(*asked, *numbers, str(row["met"]), f"{row['minutes_used']:.1f}")
    console.print(table)
    for row in [row for row in found if row["kind"] in {"ratio", "kill", "contender"}]:
        console.print(json.dumps({key: value for key, value in row.items() if key not in {"machine", "versions"}}))


def main() -> None:
    """Measure what `bench/results/compress.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drops", nargs="*", type=float, default=[0.5, 1.0])
    parser.add_argument("--minutes", nargs="+", type=float, default=[45.0])
    parser.add_argument("--runtimes", nargs="+", default=["openvino"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--kills", type=int, default=0, help="times that a search on the digits is killed")
    parser.add_argument("--kill-minutes", type=float, default=4.0, help="time of that search")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        with rows.alone():
            if chosen.kills:
                kill(chosen.kills, chosen.kill_minutes, chosen.seeds[0])
            for seed in chosen.seeds if chosen.drops else []:
                for minutes in chosen.minutes:
                    for runtime in chosen.runtimes:
                        for drop in chosen.drops:
                            measure_budget(drop, minutes, runtime, seed)
    show()


if __name__ == "__main__":
    main()
