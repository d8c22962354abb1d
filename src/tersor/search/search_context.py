"""What the phases of a search share: tools, clock, budget, and the points so far."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tersor import recipe as recipes
from tersor.core.progress import ProgressReporter
from tersor.evaluation.multiply_peak import INTEGERS
from tersor.evaluation.standard_error import error_of_drop
from tersor.recipe import Stage
from tersor.recipe.data_source import YOUR_DATA
from tersor.search.candidate import Candidate
from tersor.search.candidate_latency import Measurement
from tersor.search.compression_budget import Budget
from tersor.search.folder import SearchFolder
from tersor.search.front import Point, front, pick
from tersor.search.plan import Clock
from tersor.search.study import Record, Study
from tersor.search.workbench import Exported, Workbench

_KEPT_EVERY = 10.0
"""Seconds between two writes of the used time, from which a killed search resumes."""


_MODEL = """\
# The network was passed in Python. Before `tersor run`, name a function that builds it, and its weights file:
# {key}: {{name: package.module:function, weights: FILE}}
"""
_DATA = """\
# The images were passed in Python. Before `tersor run`, name their folder or a function that returns them:
# folder: PATH, or name: package.module:function
"""


class TimeBar:
    """One bar for the whole search, in seconds. A trial advances it and prints nothing.

    Attributes:
        values: shown beside the bar.
        keep: called every few seconds.
    """

    def __init__(self, progress: ProgressReporter, clock: Clock) -> None:
        self._progress, self._clock = progress, clock
        self._shown = 0
        self._kept = 0.0
        self.values: dict[str, float] = {}
        self.keep: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Start the bar."""
        self._shown = 0
        self._progress.start("compress", int(self._clock.total))
        self.advance()

    def start(self, task: str, total: int) -> None:
        """Do nothing: the bar counts seconds."""

    def advance(self, items: int = 1, **values: float) -> None:
        """Move the bar to the time used."""
        if self._clock.used > self._kept + _KEPT_EVERY:
            self._kept = self._clock.used
            self.keep()
        seconds = min(int(self._clock.used), int(self._clock.total))
        if seconds > self._shown:
            self._progress.advance(seconds - self._shown, **self.values)
            self._shown = seconds

    def say(self, line: str) -> None:
        """Do nothing: the lines of a trial are in its recipe and its numbers."""

    def tell(self, line: str) -> None:
        """Print a line about the search itself."""
        self._progress.say(line)


@dataclass
class Search:
    """One search.

    Attributes:
        original: the measured original; drops are computed from it.
        best: the point in `model.onnx`.
        named: the students and resolutions that the user named, which are tried before all others.
    """

    bench: Workbench
    study: Study
    folder: SearchFolder
    clock: Clock
    budget: Budget
    measurement: Measurement
    bar: TimeBar
    original: Point | None = None
    best: Point | None = None
    points: list[Point] = field(default_factory=list[Point])
    named: Sequence[Candidate] = ()

    def __post_init__(self) -> None:
        self.bar.keep = self._keep

    @property
    def runtime(self) -> str:
        """The target runtime."""
        return self.bench.experiment.recipe.target.runtime

    @property
    def reference(self) -> float:
        """The metric of the original on the validation images."""
        assert self.original is not None, "the original is measured first"
        return self.original.validation

    @property
    def evidence_seconds(self) -> float:
        """Seconds that `evidence.json` is expected to take after the points were tested."""
        return self.folder.state.costs.evidence(sum(point.test is not None for point in self.points))

    def reserve(self, more: int = 0) -> float:
        """Seconds to reserve for the end, if `more` points are tested in addition to the current ones."""
        points, sizes = len(self.tested_at_the_end()) + more, len(self.measurement.batch_sizes)
        return self.folder.state.costs.reserve(self.clock.total, points, sizes)

    def restore(self) -> None:
        """Read the points of an earlier process. A finished search is extended: it has more time now."""
        if self.folder.state.finished:
            self._extend()
        baselines = self.folder.state.baselines
        if not baselines:
            return
        self.original = baselines[0]
        usable = [point for point in baselines if point.runtime == self.runtime and point.precision != "float32"]
        records = [each for each in self.study.records() if each.rung or self.is_trained(each.of)]
        points = [*baselines[:1], *usable, *(record.point for record in records)]
        self.points = list({each.name: each for each in points if (self.folder.path / each.file).is_file()}.values())
        self.best = self.choose()
        self.folder.hand_over(self.best)

    def _extend(self) -> None:
        """Start the work of a finished search again; without a trained candidate, from the survey on."""
        state = self.folder.state
        state.finished = False
        state.extended = any(record.rung for record in self.study.records())
        state.survey_until = None
        if not state.extended:
            state.rungs = []
        self.save()

    @property
    def untried(self) -> list[Candidate]:
        """The candidates that the user named and that have no trial."""
        done = {record.of.name for record in self.study.records()} | self.study.failed.keys()
        return [candidate for candidate in self.named if candidate.name not in done]

    def is_trained(self, candidate: Candidate) -> bool:
        """Whether a candidate starts from trained weights; an untrained student has no point before its training."""
        return candidate.inherits or self.bench.students[candidate.network] is not None

    def tested_at_the_end(self) -> list[Point]:
        """The points to test at the end: the front, and the free baselines of the target runtime."""
        points = {point.name: point for point in [*self.front(), *(each for each in self.points if each.free)]}
        return [point for point in points.values() if point.test is None]

    def add(self, point: Point, recipe: str) -> None:
        """Add a measured point; copy it to `model.onnx` if it is the best so far."""
        self.folder.write_point(point, recipe)
        self.points = [each for each in self.points if each.name != point.name] + [point]
        if self.original is None:
            self.original = point
        before, self.best = self.best, self.choose()
        if before is None or before.name != self.best.name:
            self.folder.hand_over(self.best)
            point = self.best
            size, milliseconds = next(iter(point.latency_ms.items()))
            self.bar.values = {"best": point.validation, f"ms at batch {size}": milliseconds}
        self.save()

    def recipe_text(self, candidate: Candidate, stages: Sequence[Stage]) -> str:
        """The recipe of a candidate. If the search was started in Python, comments list what the user has to write."""
        recipe, shared = self.bench.recipe(candidate, stages), self.bench.experiment
        comments = ""
        if shared.recipe.model.weights is None:
            comments += _MODEL.format(key="model" if candidate.inherits else "teacher")
        if recipe.data.name == YOUR_DATA:
            known = {"channels": shared.data.train.channels, "mean": shared.data.mean, "std": shared.data.std}
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=known)})
            comments += _DATA
        return comments + recipes.write(recipe)

    def candidate_of(self, point: Point) -> Candidate:
        """The candidate that a point was made from; the original for its baselines."""
        return next((record.of for record in self.study.records() if record.point.name == point.name), Candidate())

    def choose(self) -> Point:
        """The best point. The point in `model.onnx` is replaced only by a better one, not by an equal one."""
        best = None if self.best is None else self.best.name
        return pick(sorted(self.points, key=lambda point: point.name != best), self.budget, self.reference)

    def front(self) -> list[Point]:
        """The Pareto front, from the fastest to the slowest network, with the best point."""
        return front(self.points, self.choose())

    def record(self, candidate: Candidate, exported: Exported, *, rung: int = 0, steps: int = 0, seconds: float = 0.0,
               stages: tuple[dict[str, object], ...] = (), rounding_loss: float | None = None) -> Record:  # fmt: skip
        """Measure the latency of an exported candidate, and make the record of its trial."""
        size = candidate.pixels
        image = self.bench.example(candidate) if size else None
        name = candidate.trained(steps) if rung else candidate.name
        latency = self.measurement.latency(exported.file, image)
        point = Point(
            name=name,
            description=str(candidate),
            file=self.folder.relative(exported.file),
            runtime=self.runtime,
            precision=INTEGERS,
            family=candidate.family,
            free=candidate == Candidate() and not rung,
            validation=exported.validation,
            drop_error=self.drop_error(exported.right, exported.validation),
            latency_ms=latency.ms,
            latency_error=latency.error,
            bytes=exported.bytes,
            macs=exported.macs,
            steps=steps,
            seconds=round(seconds, 1),
        )
        return Record(
            candidate=candidate.parameters, rung=rung, point=point, stages=list(stages), rounding_loss=rounding_loss
        )

    def drop_error(self, right: NDArray[np.bool_] | None, metric: float) -> float:
        """One standard error of the difference from the original on the validation images, in points."""
        images = len(self.bench.validation.images)
        return round(error_of_drop(right, self.folder.original_right, metric, images), 3)

    def save(self) -> None:
        """Write the state, with the seconds used."""
        self._keep()
        self.bar.advance()

    def _keep(self) -> None:
        self.folder.state.used = self.clock.used
        self.folder.save()

    @contextmanager
    def timed(self, kind: str) -> Generator[None]:
        """Context that stores the seconds of its body as the cost of this kind of work."""
        start = self.clock.used
        yield
        setattr(self.folder.state.costs, kind, self.clock.used - start)
