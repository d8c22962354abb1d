"""The end of a search: the front, the speedup over the fastest free baseline, and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from tersor.core.machine import machine
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.results import Machine, Speedup
from tersor.evaluation.session import open_session
from tersor.evaluation.timings import Ratio, Timings
from tersor.search import search_metric
from tersor.search.folder import Front
from tersor.search.front import Point, front, shortfall, violations
from tersor.search.front_page import write_front_page
from tersor.search.learning_curves import expected
from tersor.search.plan import SPEEDUP_SECONDS
from tersor.search.promotion import promoted
from tersor.search.search_context import Search

_LONGEST = 30.0
"""Seconds of the longest final measurement for each batch size."""
_MORE_TIME = 3
"""The advice predicts the drop after this multiple of the search time."""


def write_front(search: Search, *, finished: bool) -> Front:
    """Write `front.json` and `report.html`; at the end of a search with the speedup."""
    best = search.choose()
    kept = front(search.points)
    speedup = _speedup(search, best) if finished else {}
    names = {point.name for point in kept}
    data = search.bench.experiment.data
    images = len(search.bench.validation.images)
    lacking = shortfall(best, search.budget, search.reference)
    made = Front(
        metric=search.bench.experiment.task.metric,
        budget=str(search.budget),
        limits=search.budget.as_numbers(),
        runtime=search.runtime,
        mean=data.mean,
        std=data.std,
        minutes=search.clock.total / 60,
        minutes_used=search.clock.used / 60,
        machine=Machine.model_validate(machine()),
        validation_images=images,
        validation_error=search_metric.standard_error(search.reference, images),
        test_images=len(data.test),
        original=search.original.name if search.original else "",
        baselines=[next((each for each in search.points if each.name == point.name), point)
                   for point in search.folder.state.baselines],
        best=best.name,
        met=not lacking,
        shortfall=lacking,
        advice=advice(search, best) if lacking or (finished and best.free) else [],
        speedup=speedup,
        points=kept,
        dominated=[point for point in search.points if point.name not in names],
        failed=search.study.failed,
    )  # fmt: skip
    search.folder.write_front(made)
    write_front_page(search.folder.path, made)
    return made


def _speedup(search: Search, best: Point) -> dict[int, Speedup]:
    """How much faster the best point is than the fastest free baseline at each batch size, with intervals."""
    sizes = search.measurement.batch_sizes
    fastest = {min(search.folder.state.baselines, key=lambda point: point.latency_ms[size]).name for size in sizes}
    baselines = [point for point in search.folder.state.baselines if point.name in fastest]
    if best.free or best.runtime != search.runtime:
        return {}
    openers = {
        point.name: partial(
            open_session,
            search.folder.path / point.file,
            point.runtime,
            precision="float32" if point.name.endswith("float32") else None,
        )
        for point in [best, *baselines]
    }
    names = [point.name for point in baselines]

    def speedup_ratio(timings: Timings, size: int) -> list[Ratio]:
        return [timings.ratio(timings.fastest(names, size), best.name, size)]

    image = search.bench.example(search.candidate_of(best))
    if image.shape != search.bench.example(search.candidate_of(baselines[0])).shape:
        return {}
    left = (search.clock.left - search.evidence_seconds) / len(sizes)
    seconds = min(max(left, SPEEDUP_SECONDS), _LONGEST)
    timings = measure_latency(openers, image, sizes, ratios=speedup_ratio, seconds=seconds)
    return {size: Speedup.model_validate(asdict(speedup_ratio(timings, size)[0])) for size in sizes}


def advice(search: Search, best: Point) -> list[str]:
    """What to expect of more time, a larger drop or another runtime, if the budget is not met or nothing was gained."""
    lines = [*_more_time(search, best), *_more_loss(search, best), *_another_runtime(search)]
    met = not violations(best, search.budget, search.reference)
    return lines if lines or met else ["No measured network is closer to the budget. Raise several limits."]


def _more_time(search: Search, best: Point) -> list[str]:
    """The drop that is expected after more time: of the best network, or of another one if the best is not trained."""
    trained = [record for record in search.study.records() if record.rung]
    if not trained:
        return ["More time: no candidate could be trained in the given time."]
    seconds = _MORE_TIME * max(record.point.seconds for record in trained)
    of_best = [record for record in trained if record.point.name == best.name]
    (record,) = of_best or promoted(search, trained, 1, seconds)
    point = record.point
    if "drop" not in violations(point, search.budget, search.reference):
        return []
    drop, after = search.reference - point.validation, search.reference - expected(search, record, seconds)
    minutes = f"{_MORE_TIME * search.clock.total / 60:.0f} minutes"
    network = "the same network" if of_best else point.description
    return [f"More time: in {minutes} {network} is expected to lose about {after:.2f} points instead of {drop:.2f}."]


def _more_loss(search: Search, best: Point) -> list[str]:
    """The smallest drop of a network that meets the other limits, and is faster than the best one."""
    if search.budget.points is None:
        return []
    fitting = [
        point
        for point in search.points
        if violations(point, search.budget, search.reference).keys() == {"drop"}
        and (point.mean_ms < best.mean_ms or not best.free)
    ]
    if not fitting:
        return []
    most = max(fitting, key=lambda point: point.validation)
    drop = search.reference - most.validation
    return [f"Larger drop: {most.description} meets the other limits and loses {drop:.2f} points."]


def _another_runtime(search: Search) -> list[str]:
    """How the original compares in the other runtimes."""
    if not search.budget.latency_ms:
        return []
    baselines = search.folder.state.baselines
    here = next(point for point in baselines if point.runtime == search.runtime)
    faster: Sequence[Point] = [
        point for point in baselines if point.runtime != search.runtime and point.mean_ms < here.mean_ms
    ]
    return [
        f"Another runtime: in {point.runtime} the original takes {point.mean_ms / here.mean_ms:.2f} of the time."
        for point in faster
    ]
