"""What a search gained, in words. Does not import torch."""

from __future__ import annotations

import math
from pathlib import Path

from tersor.core.errors import counted
from tersor.evaluation.results import Speedup
from tersor.report.verdict import RUNTIMES, describe_speedup, size_change
from tersor.search.compression_budget import Budget
from tersor.search.folder import MODEL, Front
from tersor.search.front import CEILING, Point, like, reason, share_of_budget, shortfall

_MOST_NAMES = 8


def verdict_lines(front: Front) -> list[str]:
    """The gain over the fastest free baseline, the share of the budget, why the network was chosen, and advice."""
    best, original, metric = front.point(front.best), front.point(front.original), _metric(front)
    size = size_change(original, best, " times")
    size += " as the original" if size == "same size" else " than the original"
    if best.free:
        found = f"{_nothing_found(front)}." if front.met else "No network meets the budget."
        numbers = f"{metric}, {size}"
        if best.name == original.name:
            numbers = f"{front.metric} {best.validation if best.test is None else best.test:.2f} %"
        first = f"{best.description}: {numbers}. {found}"
    else:
        first = f"{best.description}: {'; '.join([*_speedups(front), size, metric])}."
    first = " ".join([first, *_another_runtime(front)])
    budget = Budget.of_numbers(front.limits)
    lines = [
        first,
        f"Meets the budget: {share_of_budget(best, budget, original.validation)}."
        if front.met
        else f"This network does not meet the budget ({front.budget}): {front.shortfall}.",
        reason(best, budget, met=front.met),
    ]
    images = f"{front.validation_images} validation images"
    if best.name == original.name:
        lines.append(f"One standard error of the metric is {front.validation_error:.2f} points ({images}).")
    else:
        change = best.validation - original.validation
        lines.append(f"On the {images}: {change:+.2f} points, with a standard error of {best.drop_error:.2f}.")
        if budget.points is not None and best.drop_error > budget.points:
            more = more_images(tests_chose=front.tests_chose)
            lines.append(f"The standard error is larger than the allowed drop. {more}")
        lines += _on_test_images(front, budget)
    return [*lines, *_over_original(front), *single(front), *saturation(front), *front.advice]


def _nothing_found(front: Front) -> str:
    if all(point.free for point in (*front.points, *front.dominated)):
        return "No other network was measured in the given time"
    others = [point for point in (*front.points, *front.dominated) if not point.free]
    networks = {point.description for point in others}  # a network measured before and after training has two points
    trained = len({point.description for point in others if point.steps})
    better = "faster" if Budget.of_numbers(front.limits).points is not None else "more accurate"
    return (
        f"No {better} network was found within the budget among {counted(len(networks), 'measured network')}, "
        f"{trained} of them trained"
    )


def _on_test_images(front: Front, budget: Budget) -> list[str]:
    """The change on the test images, and whether it is more than the allowed drop."""
    best, original = front.point(front.best), front.point(front.original)
    if best.test is None or original.test is None:
        return []
    change = best.test - original.test
    line = (
        f"On the {front.test_images} test images: {change:+.2f} points, with a standard error of "
        f"{best.test_drop_error:.2f}."
    )
    if _exceeds_on_test(front, budget):
        line += " Warning: this is more than the allowed drop, which was met on the validation images."
    return [line]


def _exceeds_on_test(front: Front, budget: Budget) -> bool:
    """Whether a network that meets the budget loses more than the allowed drop on the test images."""
    best, original = front.point(front.best).test, front.point(front.original).test
    if best is None or original is None or budget.points is None:
        return False
    return front.met and original - best > budget.points


def _over_original(front: Front) -> list[str]:
    """The speedup over the original in the same runtime, with the errors of the latencies."""
    best, original = front.point(front.best), front.point(front.original)
    if best.runtime != original.runtime or best.name == original.name:
        return []
    speedups: list[str] = []
    for size, milliseconds in best.latency_ms.items():
        error = math.exp(best.latency_error.get(size, 0.0))
        value = original.latency_ms[size] / milliseconds
        ratio = Speedup(value=value, low=value / error, high=value * error, n=0, groups=0)
        speedups.append(f"{describe_speedup(ratio)} at batch {size}")
    return [f"Compared with {_named(front, original.name)}: {' and '.join(speedups)}."]


def last_line(front: Front, folder: Path) -> str:
    """The network that was found, its metric and its gain, and the files to use."""
    best, files = front.point(front.best), f"report.html and all networks (points/ and baselines/) are in {folder}."
    gain = ", ".join(_speedups(front)) or "the speedup was not measured"
    if best.free:
        found = _nothing_found(front)
        gain = f"a baseline that needs no search, chosen because {found[0].lower()}{found[1:]}"
    if not front.met:
        gain = f"the budget is not met: {front.shortfall}"
    elsewhere, model = faster_elsewhere(front), str(folder / MODEL)
    use = f"Use {model}" if front.met else f"{model} is the closest network that was found"
    if elsewhere is not None and not _shortfall(front, elsewhere):
        here = f"{use[:1].lower()}{use[1:]}" if front.met else use
        use = f"Use {folder / elsewhere.file} in {RUNTIMES[elsewhere.runtime]}; in {RUNTIMES[front.runtime]}, {here}"
    warning = ["Warning: the drop on the test images is more than allowed."]
    doubts = [*_another_runtime(front), *warning * _exceeds_on_test(front, Budget.of_numbers(front.limits))]
    return " ".join([f"{best.name}: {_metric(front)}; {gain}.", *doubts, f"{use}; {files}"])


def faster_elsewhere(front: Front) -> Point | None:
    """The fastest free baseline of another runtime, if it is measurably faster than the network at a batch size."""
    others = [point for point in front.baselines if point.runtime != front.runtime]
    faster = [point for point in others if _faster_at(point, front.point(front.best))]
    return min(faster, key=lambda point: point.mean_ms, default=None)


def _faster_at(point: Point, best: Point) -> list[int]:
    """The batch sizes at which a point is faster than the best one by more than the measurement error."""
    return [size for size, milliseconds in like(point, best).latency_ms.items() if milliseconds < best.latency_ms[size]]


def _another_runtime(front: Front) -> list[str]:
    """A sentence about a file of another runtime that needs no search and is faster."""
    point = faster_elsewhere(front)
    if point is None:
        return []
    times = ", ".join(
        f"{point.milliseconds(size)} ms at batch {size}" for size in _faster_at(point, front.point(front.best))
    )
    lacking = _shortfall(front, point)
    budget = f"It does not meet the budget: {lacking}." if lacking else "It meets the budget."
    name = _named(front, point.name)
    return [f"{name[:1].upper()}{name[1:]} is faster and needs no search: {times}. {budget}"]


def _shortfall(front: Front, point: Point) -> str:
    return shortfall(point, Budget.of_numbers(front.limits), front.point(front.original).validation)


def _metric(front: Front) -> str:
    """The metric on the test images, and its change; on the validation images before the end."""
    best, original = front.point(front.best), front.point(front.original)
    split, after, before = ("test", best.test, original.test)
    if after is None or before is None:
        split, after, before = "validation", best.validation, original.validation
    return f"{front.metric} {after:.2f} %, {after - before:+.2f} points on the {split} images"


def single(front: Front) -> list[str]:
    """A sentence about a front of one point."""
    if len(front.points) > 1:
        return []
    name = front.points[0].name
    line = (
        f"The Pareto front has one point: of all networks measured in {RUNTIMES[front.runtime]}, {name} has the best "
        f"{front.metric}, and none is measurably faster or smaller. For any other budget, this "
        "network or an equal one is chosen."
    )
    return [line]


def more_images(*, tests_chose: bool) -> str:
    """How to get more validation images.

    Args:
        tests_chose: whether half of the test images are the validation images.
    """
    if tests_chose:
        return "Use more test images: half of them are the validation images."
    return (
        "Use more validation images: add some to the data or, if it has none of its own, write a larger "
        "validation (`--validation`). Then search in another folder."
    )


def saturation(front: Front) -> list[str]:
    """A line if the validation images cannot tell the best network from the original."""
    best, original = front.point(front.best), front.point(front.original)
    if best.name == original.name or min(best.validation, original.validation) < CEILING:
        return []
    line = (
        f"The {front.metric} of the original and of this network is 100 % on the {front.validation_images} validation "
        f"images, so candidates cannot be ranked by it. {more_images(tests_chose=front.tests_chose)}"
    )
    return [line]


def test_use(front: Front) -> str:
    """How many times the test images were used, and on which points."""
    uses = ["at the start, on the original, to check whether it was trained on the validation images"]
    for number, names in enumerate(front.test_runs):
        when = "at the end of the continued search" if number else "at the end"
        uses.append(f"{when}, on {', '.join(names) if len(names) <= _MOST_NAMES else f'{len(names)} points'}")
    times = {1: "once", 2: "twice"}.get(len(uses), f"{len(uses)} times")
    told = f"{front.test_images} test images were used {times}: {'; '.join(uses)}."
    if front.tests_chose:
        told += (
            " The validation images are the other half of the test set, because the original was probably trained on "
            "the images that this search held out."
        )
    return told


def _speedups(front: Front) -> list[str]:
    """The speedups with their intervals, grouped by the baseline that they are over."""
    gains: dict[str, list[str]] = {}
    for size, ratio in front.speedup.items():
        gains.setdefault(ratio.baseline, []).append(f"{describe_speedup(ratio)} at batch {size}")
    return [
        f"{' and '.join(texts)} compared with {_named(front, name)}, the fastest baseline that needs no search"
        for name, texts in gains.items()
    ]


def _named(front: Front, name: str) -> str:
    point = front.point(name)
    return f"{point.description} ({RUNTIMES[point.runtime]}, {point.precision})"
