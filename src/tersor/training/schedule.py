"""How a value moves over a stage: the progress, from 0 to 1, goes in; the value comes out.

Pure functions of the time that the loop tells: nothing counts here, so nothing is lost by a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, cast

from tersor.core.errors import InputError
from tersor.core.import_path import import_function, is_function_path
from tersor.training.options import LearningRateSchedule

Shape = Literal["constant", "linear", "cubic", "cosine"]


def interpolate(shape: Shape, progress: float, start: float, end: float) -> float:
    """The value at `progress` on the way from `start` (at 0) to `end` (at 1), both met exactly.

    `constant` is `end` all along. `cubic` moves fast first: `end + (start - end) * (1 - progress)^3` (Zhu and Gupta,
    "To prune, or not to prune", 2017).
    """
    assert 0 <= progress <= 1, progress
    match shape:
        case "constant":
            left = 0.0
        case "linear":
            left = 1 - progress
        case "cubic":
            left = (1 - progress) ** 3
        case "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
    return left * start + (1 - left) * end


def curve(name: str) -> Callable[[float], float]:
    """Progress -> what fraction of the way is done: a shape by name, or a function of the user's.

    Raises:
        InputError: the function cannot be found; it gives no number from 0 to 1, at the quarters or when it is called.
    """
    if not is_function_path(name):
        return lambda progress: interpolate(cast("Shape", name), progress, 0.0, 1.0)
    function = import_function(name)

    def checked(progress: float) -> float:
        found = function(progress)
        if not isinstance(found, int | float) or not 0 <= found <= 1:
            raise InputError(f"'{name}' gave {found!r} at progress {progress:g}. Give a number from 0 to 1.")
        return float(found)

    for quarter in range(5):
        checked(quarter / 4)
    return checked


def learning_rate_factor(schedule: LearningRateSchedule, step: int, steps: int, warmup_steps: int) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (from 0) of `steps`.

    The warm-up rises linearly and reaches 1 at its last step. `cosine` and `linear` fall from 1 towards 0 over the
    steps after it; `step` drops after fractions of the whole stage.
    """
    assert 0 <= step < steps, (step, steps)
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
    match schedule.name:
        case "constant":
            fall = 1.0
        case "step":
            passed = sum(step >= milestone * steps for milestone in schedule.milestones)
            fall = schedule.factor**passed
        case "linear" | "cosine":
            fall = interpolate(schedule.name, progress, start=1.0, end=0.0)
    return rise * fall
