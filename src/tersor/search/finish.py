"""The end of a search: the front, the speedup over the fastest free baseline, and advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from tersor.core.machine import machine
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.results import Machine
from tersor.evaluation.session import open_session
from tersor.evaluation.standard_error import standard_error
from tersor.evaluation.timings import Ratio, Timings
from tersor.search.candidate import Candidate
from tersor.search.candidate_latency import error_of
from tersor.search.dropped import dropped
from tersor.search.folder import Front
from tersor.search.front import BaselineSpeedup, Point, front, pick, shortfall, violations
from tersor.search.front_page import write_front_page
from tersor.search.learning_curves import error_of_expected, expected
from tersor.search.plan import AGAIN, speedup_seconds
from tersor.search.promotion import improvable
from tersor.search.search_context import Search

_LONGEST = 30.0
"""Seconds of the longest final measurement for each batch size."""
_MOST_TIMED = 3
"""Points that are timed at the end, if the first ones turn out slower than others."""
_LARGER = 5
"""The advice names a larger drop up to this multiple of the allowed one, or one point more if that is larger."""
_MORE_TIME = 3
"""The advice predicts the drop after this multiple of the search time."""


def write_front(search: Search, *, finished: bool) -> Front:
    """Write `front.json` and `report.html`; at the end of a search with the speedup."""
    best, kept, speedup = search.choose(), search.front(), dict[int, BaselineSpeedup]()
    if finished:
        best, kept, speedup = _time_best(search, kept)
        for point in kept:
            if not point.free:  # the free baselines share a folder
                search.folder.write_numbers(point)
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
        validation_error=standard_error(search.reference, images),
        test_images=len(data.test),
        tests_chose=bool(search.folder.state.seen),
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
        dropped=dropped(search, kept) if finished else {},
        test_runs=search.folder.state.test_runs,
    )  # fmt: skip
    search.folder.write_front(made)
    write_front_page(search.folder.path, made)
    return made


def _time_best(search: Search, tested: list[Point]) -> tuple[Point, list[Point], dict[int, BaselineSpeedup]]:
    """Time the best of the tested points together with the free baselines; returns it, the front, and its speedup.

    Its latency becomes that of the fastest baseline divided by the speedup, so that the two agree, unless the earlier
    measurement is more precise. If another point is then better, that one is timed too.
    """
    points = {point.name: point for point in tested}
    baselines = {point.name: point for point in search.folder.state.baselines}
    timed: dict[str, dict[int, BaselineSpeedup]] = {}
    allowed = sorted(points, key=lambda name: search.best is None or name != search.best.name)
    while (best := pick([points[name] for name in allowed], search.budget, search.reference)).name not in timed:
        timed[best.name] = speedup = _speedup(search, best)
        latency = {size: baselines[each.baseline].latency_ms[size] / each.value for size, each in speedup.items()}
        errors = {
            size: round(math.hypot(error_of(each), baselines[each.baseline].latency_error.get(size, 0.0)), 4)
            for size, each in speedup.items()
        }
        for size, error in [*errors.items()]:  # of two measurements, the more precise one counts
            if best.latency_error.get(size, math.inf) < error:
                del latency[size], errors[size]
        points[best.name] = best.model_copy(
            update={"latency_ms": {**best.latency_ms, **latency}, "latency_error": {**best.latency_error, **errors}}
        )
        if len(timed) == _MOST_TIMED:
            allowed = list(timed)
    search.points = [points.get(point.name, point) for point in search.points]
    if search.best is None or search.best.name != best.name:
        search.folder.hand_over(best)
    search.best = best
    return best, front(points.values(), best), timed[best.name]


def _speedup(search: Search, best: Point) -> dict[int, BaselineSpeedup]:
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

    def speedup_ratio(timings: Timings, size: int) -> Ratio:
        return timings.ratio(timings.fastest(names, size), best.name, size)

    image = search.bench.example(search.candidate_of(best))
    if image.shape != search.bench.example(search.candidate_of(baselines[0])).shape:
        return {}
    ratios, seconds = lambda timings, size: [speedup_ratio(timings, size)], final_seconds(search)
    timings = measure_latency(openers, image, sizes, ratios=ratios, seconds=seconds)
    return {
        size: BaselineSpeedup(baseline=timings.fastest(names, size), **asdict(speedup_ratio(timings, size)))
        for size in sizes
    }


def final_seconds(search: Search) -> float:
    """Seconds of the final measurement for each batch size. The minimum time for a second one is reserved."""
    least, sizes = AGAIN * speedup_seconds(search.clock.total), len(search.measurement.batch_sizes)
    left = (search.clock.left - search.evidence_seconds) / sizes - least
    return min(max(left, least), _LONGEST)


def advice(search: Search, best: Point) -> list[str]:
    """Advice on more time, a larger drop or another runtime, if the budget is not met or a free baseline is best."""
    lines = [
        *_out_of_reach(search, best),
        *_more_time(search, best),
        *_more_loss(search, best),
        *_another_runtime(search),
    ]
    met = not violations(best, search.budget, search.reference)
    return lines if lines or met else [_not_at_once(search)]


def _not_at_once(search: Search) -> str:
    """The advice where every limit is met by some network, but not all by one."""
    none = "No measured network meets all limits at once"
    for point in search.points:
        if len(violations(point, search.budget, search.reference)) == 1:
            lacking = shortfall(point, search.budget, search.reference)
            others = f"one network ({point.description}) meets all others, but {lacking}"
            return f"{none}. It is enough to raise a single limit: {others}."
    return f"{none}, and raising a single limit would not be enough. Raise more than one."


def _out_of_reach(search: Search, best: Point) -> list[str]:
    """The exceeded limits of latency and size that no network meets, with the network nearest to each."""
    lacking = violations(best, search.budget, search.reference)
    lines: list[str] = []
    for size, limit in search.budget.latency_ms.items():
        if f"latency {size}" in lacking:
            fastest = min(search.points, key=lambda point: point.latency_ms[size])
            if fastest.latency_ms[size] > limit:
                lines.append(
                    f"Latency: no network reached {limit:g} ms at batch {size}; the fastest takes "
                    f"{fastest.milliseconds(size)} ms: {fastest.description}."
                )
    limit, smallest = search.budget.megabytes, min(search.points, key=lambda point: point.bytes)
    if limit is not None and "size" in lacking and smallest.bytes / 1e6 > limit:
        lines.append(
            f"Size: no network reached {limit:g} MB; the smallest has {smallest.bytes / 1e6:.3f} MB: "
            f"{smallest.description}."
        )
    return lines


def _more_time(search: Search, best: Point) -> list[str]:
    """The drop that is expected after more time: of the best network, or of another one if the best is not trained."""
    trained = [record for record in search.study.records() if record.rung]
    if not trained:
        surveyed = [record for record in search.study.records() if record.of != Candidate()]
        if surveyed and not any(improvable(search, record) for record in surveyed):
            return []
        costs = search.folder.state.costs  # time for another survey, and twice the least, so that it is not just missed
        needed = search.clock.used + costs.survey + 2 * costs.least + search.reserve(more=1)
        minutes = max(math.ceil(needed / 60), math.floor(search.clock.minutes) + 1)
        longer = f"Otherwise continue the search, with a total time of at least {minutes} minutes."
        return [f"More time: no candidate has been trained. If report.html lists failures, correct them. {longer}"]
    seconds = _MORE_TIME * max(record.point.seconds for record in trained)
    of_best = [record for record in trained if record.point.name == best.name]
    free = min((point.mean_ms for point in search.points if point.free), default=math.inf)
    faster = [record for record in trained if record.point.mean_ms < free]
    record = max(of_best or faster or trained, key=lambda each: expected(search, each, seconds))
    point = record.point
    if "drop" not in violations(point, search.budget, search.reference):
        return []
    drop, after = search.reference - point.validation, search.reference - expected(search, record, seconds)
    minutes = f"a total time of {_MORE_TIME * search.clock.total / 60:.0f} minutes"
    network = "the same network" if of_best else f"one network ({point.description})"
    error = error_of_expected(search, record, seconds)
    lost = f"about {after:.2f} points (standard error {error:.2f}) instead of {drop:.2f}"
    enough = "" if after <= (search.budget.points or 0.0) else " This is still more than allowed."
    return [f"More time: with {minutes}, {network} is expected to lose {lost}.{enough}"]


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
    if drop > max(_LARGER * search.budget.points, search.budget.points + 1):
        return []
    others = " and meets the other limits" * bool(search.budget.latency_ms or search.budget.megabytes)
    line = f"Larger drop: one network ({most.description}) loses {drop:.2f} points{others}. To choose it, use "
    return [f"{line}`tersor pick` with max_drop: {math.ceil(100 * drop) / 100:g} (`--max-drop`)."]


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
        f"Another runtime: in {point.runtime}, {point.description} takes {point.mean_ms / here.mean_ms:.2f} times as "
        f"long as the original in {search.runtime}. To compress for it, search in another folder with runtime: "
        f"{point.runtime} (`--runtime`)."
        for point in faster
    ]
