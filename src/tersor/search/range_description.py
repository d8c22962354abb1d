"""The feasible range of a search in words: what the free baselines reach, the budget and the plan."""

from __future__ import annotations

from tersor.evaluation.standard_error import standard_error
from tersor.search.compression_budget import in_points
from tersor.search.front import shortfall
from tersor.search.plan import survey_seconds
from tersor.search.search_context import Search
from tersor.search.verdict_line import more_images

_NOISY = 0.15
"""Half the width of an interval of a latency, as a fraction of it, from which the machine is too busy."""


def describe_range(search: Search) -> list[str]:
    """Lines that show the feasible range, the budget, the seconds of a training step, and the time plan."""
    state = search.folder.state
    meaning = "± is half the width of the 95 % interval of a latency"
    lines = [
        *_validation(search),
        f"free baselines: the original in float and its 8-bit version, not trained further; {meaning}",
    ]
    for point in state.baselines:
        lacking = shortfall(point, search.budget, search.reference)
        lines.append(
            f"  {point.runtime} {point.precision}: {point.validation:.2f} %, {point.latencies}, "
            f"{point.bytes / 1e6:.3f} MB" + (f"; {lacking}" if lacking else "")
        )
    noise = max((max(point.latency_error.values(), default=0.0) for point in state.baselines), default=0.0)
    if noise > _NOISY:
        lines.append(
            f"warning: latencies are uncertain by up to {100 * noise:.0f} %, probably because other processes use the "
            "processor. Stop them, and start the search again in another folder, because a search chooses networks by "
            "latency."
        )
    step, left = state.costs.step, max(0.0, search.clock.left)
    reserve = min(left, search.reserve())
    left -= reserve
    lines.append(f"budget: {search.budget}; goal: the fastest network within it" if search.budget.points is not None
                 else f"budget: {search.budget}; goal: the most accurate network within it")  # fmt: skip
    lines.append(
        f"plan: {(left + reserve) / 60:.1f} minutes left: {survey_seconds(left) / 60:.1f} for measuring untrained "
        "candidates, "
        f"{(left - survey_seconds(left)) / 60:.1f} for training them, {reserve / 60:.1f} for the final measurements"
        + _steps(left - survey_seconds(left), step)
    )
    return lines


def _steps(seconds: float, step: float) -> str:
    """The time of a training step of the original, and how many fit into the time for training; "" if it is unknown."""
    one = f"one training step of the original takes {step:.2g} s"
    return f"; {one}; about {seconds / step:.0f} of them fit into the time for training" if step else ""


def _validation(search: Search) -> list[str]:
    """The number of validation images with the standard error of the metric, and a warning if they are too few."""
    images, metric = len(search.bench.validation.images), search.bench.experiment.task.metric
    error, allowed = standard_error(search.reference, images), search.budget.points
    lines = [f"validation: {images} images, on which one standard error of the {metric} is {error:.2f} points"]
    if allowed is not None and allowed < error:
        lines.append(
            f"warning: the allowed drop of {in_points(allowed)} is smaller than one standard error ({error:.2f}). "
            f"{more_images(tests_chose=bool(search.folder.state.seen))}"
        )
    return lines
