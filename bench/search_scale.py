"""Measure how a search scales: trials in several workers, and the time to open and continue a long study.

    python bench/search_scale.py

- Simulated trials, which sleep for 10 s, in 1, 2 and 4 Ray workers: wall time, relative to the ideal.
- A study of many trials in SQLite: seconds to open it, to read all records, and to propose one more candidate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rows
from tersor.search.candidate import Candidate
from tersor.search.front import Point
from tersor.search.space import Space
from tersor.search.study import Record, Study
from tersor.search.trial import Training
from tersor.search.workers import Files, Outcome, Workers

RESULT = "search_scale"
TRIALS, SECONDS = 16, 10.0
WORKERS = (1, 2, 4)
STUDIES = (100, 500, 2000)
REPETITIONS = 3


class Sleeper:
    """A worker whose training runs only take time."""

    def train(self, candidate: Candidate, training: Training, files: Files) -> Outcome:
        """Sleep as long as the training would take."""
        del candidate, files
        time.sleep(training.seconds)
        return Outcome({"clock.json": b"{}"})


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_workers(count: int) -> None:
    """Write the row of `count` workers."""
    identity = {"kind": "workers", "workers": count, "trials": TRIALS, "seconds": SECONDS}
    if rows.known(RESULT, identity):
        return
    import ray

    trainings = {Candidate(branches=number): Training((), (), SECONDS) for number in range(TRIALS)}
    ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            sleeper: Any = ray.remote(num_cpus=1)(Sleeper)
            actors = [sleeper.remote() for _ in range(count)]
            ray.get([each.train.remote(Candidate(), Training((), (), 0.0), {}) for each in actors])  # processes are up
            workers = Workers(ray, actors, Path(folder))
            wall = seconds_of(lambda: list(workers.train(trainings)))
    finally:
        ray.shutdown()
    ideal = TRIALS * SECONDS / count
    rows.add(RESULT, identity, {"wall": wall, "ideal": ideal, "n": 1, "spread": None}, [0])
    print(f"{count} workers: {wall:.1f} s for {TRIALS} trials, ideal {ideal:.0f} s ({wall / ideal:.3f})", flush=True)


def measure_study(trials: int) -> None:
    """Write the row of a study of so many trials."""
    identity = {"kind": "study", "trials": trials}
    if rows.known(RESULT, identity):
        return
    with tempfile.TemporaryDirectory() as folder:
        storage = f"sqlite:///{folder}/study.db"
        space = Space(9, prunable=True, students=["student"])
        study = Study(storage, "scale", ["original", "student"], 0)
        filled = seconds_of(lambda: [study.add(record(number)) for number in range(trials)])
        opened = [
            seconds_of(lambda: Study(storage, "scale", ["original", "student"], 0).records())
            for _ in range(REPETITIONS)
        ]
        again = Study(storage, "scale", ["original", "student"], 0)
        assert len(again.records()) == trials
        proposed = [
            seconds_of(lambda: again.tell(again.suggest(space.distributions())[0], None)) for _ in range(REPETITIONS)
        ]
        megabytes = (Path(folder) / "study.db").stat().st_size / 1e6
    numbers: dict[str, Any] = {
        "open": sorted(opened)[1],
        "propose": sorted(proposed)[1],
        "add": filled / trials,
        "megabytes": megabytes,
        "n": REPETITIONS,
        "spread": rows.spread(opened),
    }
    rows.add(RESULT, identity, numbers, [0])
    print(
        f"{trials} trials: opened in {numbers['open']:.2f} s, a proposal in {numbers['propose']:.2f} s, "
        f"{1000 * numbers['add']:.1f} ms to add one, {megabytes:.1f} MB",
        flush=True,
    )


def record(number: int) -> Record:
    """Return a made-up trial of the survey, different from those of other numbers."""
    candidate = Candidate(branches=number % 10, pixels=8 + number // 10)
    point = Point(
        name=candidate.name,
        description=str(candidate),
        file=f"points/{candidate.name}/model.onnx",
        runtime="onnxruntime",
        precision="int8",
        validation=90 - number % 10,
        latency_ms={1: 1.0 - 0.09 * (number % 10), 128: 100.0 - 9 * (number % 10)},
        bytes=10**6,
        macs=10**7,
    )
    return Record(candidate=candidate.parameters, rung=0, point=point)


def main() -> None:
    """Measure what `bench/results/search_scale.json` does not have yet."""
    with rows.alone():
        for count in WORKERS:
            measure_workers(count)
        for trials in STUDIES:
            measure_study(trials)


if __name__ == "__main__":
    main()
