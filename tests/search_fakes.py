"""A search without networks: a clock that only advances with work, and a workbench that simulates work."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from optuna.storages import InMemoryStorage

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS
from tersor.evaluation.results import StageRecord
from tersor.recipe import DataSource, Network, Recipe, Stage
from tersor.search import finish
from tersor.search.candidate import ORIGINAL, Candidate
from tersor.search.candidate_latency import Latency
from tersor.search.compression_budget import Budget
from tersor.search.finish import write_front
from tersor.search.folder import SearchFolder
from tersor.search.front import Point
from tersor.search.halving import halve
from tersor.search.plan import Clock
from tersor.search.search_context import Search, TimeBar
from tersor.search.space import Space
from tersor.search.study import Study
from tersor.search.survey import survey
from tersor.search.tested_points import run_on_test_images
from tersor.search.workbench import Exported
from tersor.tasks.classification import Classification

STORAGES = {}
STUDENTS = {"wide": None, "deep": None}
SPACE = Space(branches=9, prunable=True, students=list(STUDENTS))
FLOAT, INTEGERS = 90.0, 89.8


class FakeTime:
    """A clock. `slowness` multiplies the time of all work except training, which is limited by time."""

    def __init__(self):
        self.seconds = 1000.0
        self.slowness = 1.0

    def __call__(self):
        return self.seconds

    def work(self, seconds):
        self.seconds += seconds * self.slowness


def relative_ms(candidate):
    if candidate.network == "wide":
        return 0.3
    if candidate.network == "deep":
        return 2.0
    removals = (candidate.first, *candidate.later)
    kept = math.prod(each.keep_macs for each in removals)
    return (0.2 + 0.8 * kept) * (1 - sum(each.branches for each in removals) / 12)


def relative_macs(candidate):
    removals = (candidate.first, *candidate.later)
    kept = math.prod(each.keep_macs for each in removals)
    return kept * (1 - sum(each.branches for each in removals) / 12)


def metric(candidate, seconds):
    """Accuracy after some seconds of training: the drop decreases with time."""
    lost = 40.0 if not candidate.inherits else 30 * (1 - relative_ms(candidate)) ** 2
    return max(10.0, INTEGERS - lost / (1 + seconds / 20))


@dataclass
class FakeBench:
    """Simulates a `Workbench` with fake time.

    Attributes:
        log: what was done, in order.
        interrupt_at: number of the piece of work that Ctrl-C interrupts.
        broken: names of candidates that cannot be built.
        rounding: points that quantization costs, unless the last stage quantizes.
        given: the stages of every training run, interrupted ones included, with the name of the candidate.
        settled: whether each planned training is shorter than those before it.
    """

    time: FakeTime
    students: dict = field(default_factory=lambda: dict(STUDENTS))
    log: list = field(default_factory=list)
    interrupt_at: int | None = None
    broken: tuple[str, ...] = ()
    rounding: float = 0.0
    given: list = field(default_factory=list)
    checkpoint_every: int = 0

    def __post_init__(self):
        labels = torch.zeros(1000, dtype=torch.int64)
        images = SimpleNamespace(labels=labels, __len__=lambda: 1000)
        self.validation = SimpleNamespace(images=labels)
        data = SimpleNamespace(train=labels, validation=labels, test=labels, mean=None, std=None, classes=())
        recipe = Recipe(
            model=Network(name="resnet20"),
            teacher="original",
            data=DataSource(name="digits"),
            stages=(Stage(name="train"),),
        )
        self.experiment = SimpleNamespace(recipe=recipe, data=data, images=images, task=Classification())
        self.trained = {}
        self.interrupted = {}
        self.settled = []

    def _work(self, what, seconds):
        if self.interrupt_at == len(self.log):
            self.interrupt_at = None
            raise KeyboardInterrupt
        self.log.append(what)
        self.time.work(seconds)

    def recipe(self, candidate, stages):
        return self.experiment.recipe.model_copy(update={"stages": tuple(stages)})

    def build(self, candidate, trained=()):
        self._work(("build", candidate.name), 1.0)
        if candidate.name in self.broken:
            raise InputError("cannot be built")
        return candidate

    def branches(self, candidate, trained=()):
        self.build(candidate, trained)
        left = SPACE.branches - sum(each.branches for each in (candidate.first, *candidate.later))
        return [1 / left] * left

    def start_from(self, candidate, parent):
        self.trained.setdefault(candidate, self.trained[parent])

    def stage(self, candidate, name, steps, model, *, settled=False):
        self.settled.append(settled)
        return Stage(name=name, steps=steps, methods=("soft_targets",))

    def train(self, candidate, trained, seconds):
        self.given.append((candidate.name, tuple(trained)))
        earlier = self.interrupted.pop((candidate, trained[-1].name), 0.0)
        if self.interrupt_at == len(self.log):
            self.interrupt_at = None
            self.interrupted[candidate, trained[-1].name] = seconds / 2
            self.time.seconds += seconds / 2
            raise KeyboardInterrupt
        self.log.append(("train", candidate.name, trained[-1].name))
        self.time.seconds += seconds
        seconds += earlier
        self.trained[candidate] = self.trained.get(candidate, 0.0) + seconds
        record = StageRecord(
            name=trained[-1].name, methods=[], steps=100, notes=[], minutes=1.0, training_seconds=seconds,
            validation_score=metric(candidate, self.trained[candidate]) / (1 if self.experiment.task.unit else 100),
        )  # fmt: skip
        return candidate, record

    def export(self, candidate, model, file, *, quantized=False):
        self._work(("export", candidate.name), 3.0)
        if candidate.later:
            FakeLatency.of.setdefault(candidate.name, relative_ms(candidate))
        file.write_text(f"{candidate.name} {self.trained.get(candidate, 0.0)}")
        reached = metric(candidate, self.trained.get(candidate, 0.0)) - (0 if quantized else self.rounding)
        return Exported(file, reached, round(10**7 * relative_macs(candidate)), 50_000)

    def test_predictions(self, candidate, file):
        self._work(("test", str(file.parent.name)), 1.0)
        return torch.arange(25) // 22, torch.zeros(25, dtype=torch.int64)


class FakeLatency:
    """Latencies by the name in the fake file."""

    batch_sizes = (1, 128)

    def __init__(self, time):
        self.time = time

    def compare_with(self, reference, milliseconds):
        pass

    def latency(self, file, image=None):
        self.time.work(1.0)
        name = file.read_text().split()[0]
        return Latency({size: FakeLatency.of[name] * size for size in self.batch_sizes}, {})

    of: dict[str, float] = {}  # noqa: RUF012


def latencies(candidates):
    FakeLatency.of = {each.name: relative_ms(each) for each in candidates}


def without_measurements(monkeypatch):
    """Give all candidates fake latencies, and skip the final measurement."""
    kept = [round(0.1 + 0.05 * step, 2) for step in range(19)]
    latencies(
        [Candidate("wide"), Candidate("deep")]
        + [Candidate(branches=b, keep_macs=k, bits=w) for b in range(10) for k in kept for w in ("8", "4", "mixed")]
    )
    monkeypatch.setattr(finish, "_speedup", lambda _search, _best: {})
    monkeypatch.setattr(sys.modules[survey.__module__], "measure_end", lambda _search, _file: None)


def baseline(name, validation, milliseconds, precision):
    return Point(
        name=name, description=name, file=f"baselines/{name}.onnx", runtime="onnxruntime", precision=precision,
        free=True, validation=validation, latency_ms={1: milliseconds, 128: 128 * milliseconds},
        bytes=200_000, macs=10**7,
    )  # fmt: skip


def searching(path, *, minutes=10.0, budget=None, time=None, bench=None):
    """A search whose free baselines are measured already."""
    time = time or FakeTime()
    bench = bench or FakeBench(time)
    budget = budget or Budget(max_drop=1.0)
    folder = SearchFolder(path, {"budget": str(budget)})
    clock = Clock(minutes, folder.state.used, time)
    with folder.held():
        pass
    storage = STORAGES.setdefault(path, InMemoryStorage())
    study = Study(storage, "test", [ORIGINAL, *STUDENTS], 0)
    search = Search(bench, study, folder, clock, budget, FakeLatency(time), TimeBar(NO_PROGRESS, clock))
    state = folder.state
    if not state.baselines:
        state.baselines = [
            baseline("original", FLOAT, 2.0, "float32"),
            baseline(Candidate().name, INTEGERS, 1.0, "int8"),
        ]
        state.costs.export, state.costs.survey, state.costs.step, state.costs.finish = 4.0, 5.0, 0.1, 3.0
        state.costs.test = 1.0
        for point in state.baselines:
            (path / point.file).write_text(point.name)
    search.restore()
    return search


def run(search):
    """Run all phases after the feasible range."""
    survey(search, SPACE)
    halve(search)
    run_on_test_images(search)
    return write_front(search, finished=True)
