"""Schedules: values as pure functions of the progress of a stage, so that checkpoints need no schedule state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

from tersor.core.errors import InputError, counted
from tersor.core.import_path import import_function, is_function_path
from tersor.core.user_code import user_code
from tersor.data.batch_source import BatchSource
from tersor.training.options import LearningRateSchedule, Training

Shape = Literal["constant", "linear", "cubic", "cosine"]


def interpolate(shape: Shape, progress: float, start: float, end: float) -> float:
    """The value at `progress` between `start` (exactly, at 0) and `end` (exactly, at 1).

    `constant` is always `end`. `cubic` changes fast first: `end + (start - end) * (1 - progress)^3` (Zhu and Gupta,
    "To prune, or not to prune", 2017).
    """
    assert 0 <= progress <= 1, progress
    match shape:
        case "constant":
            remaining = 0.0
        case "linear":
            remaining = 1 - progress
        case "cubic":
            remaining = (1 - progress) ** 3
        case "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
    return remaining * start + (1 - remaining) * end


def curve(name: str) -> Callable[[float], float]:
    """The function from progress to fraction (0 to 1): a shape by its name, or the user's function by its import path.

    Raises:
        InputError: the function cannot be found; it does not return a number from 0 to 1.
    """
    if not is_function_path(name):
        return lambda progress: interpolate(cast("Shape", name), progress, 0.0, 1.0)
    function = import_function(name)

    def checked(progress: float) -> float:
        with user_code(f"'{name}'", function):
            value: object = function(progress)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"'{name}' returned {value!r} at progress {progress:g}. Return a number from 0 to 1.")
        return float(value)

    for quarter in range(5):
        checked(quarter / 4)
    return checked


def learning_rate_factor(schedule: LearningRateSchedule, step: int, steps: int, warmup_steps: int) -> float:
    """The factor applied to the learning rate at optimizer step `step` (from 0) of `steps`.

    The warm-up rises linearly and reaches 1 at its last step. `cosine` and `linear` then fall from 1 towards 0; `step`
    drops after fractions of the whole stage.
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


def steps_per_epoch(batches: BatchSource, training: Training) -> int:
    """Optimizer steps in one epoch; the last may accumulate fewer batches than the others.

    Raises:
        InputError: there is no batch.
    """
    if not len(batches):
        raise InputError(
            f"there is no batch to train on: the data has fewer images than one batch of {training.batch_size}. "
            "Give more images, or a smaller batch_size."
        )
    return math.ceil(len(batches) / training.accumulate)


def learning_rates(batches: BatchSource, training: Training, steps: int) -> list[float]:
    """The learning rate of every step.

    Raises:
        InputError: there is no batch; the warm-up is as long as the training.
    """
    schedule, base = training.lr_schedule, training.learning_rate()
    warmup = round(schedule.warmup_epochs * steps_per_epoch(batches, training))
    if warmup and steps and warmup >= steps:
        raise InputError(
            f"warmup_epochs is {schedule.warmup_epochs:g}, which is {counted(warmup, 'step')}, but the stage has only "
            f"{counted(steps, 'step')}. Reduce warmup_epochs, or train longer."
        )
    return [base * learning_rate_factor(schedule, step, steps, warmup) for step in range(steps)]


def rates_in_time(
    rates: Sequence[float], first: int, elapsed: Callable[[], float], seconds: float | None
) -> Iterator[float]:
    """The learning rate of each step from step `first` on, until the rates or the seconds are used up.

    With a time limit, rates are skipped if the steps are too slow, so that the schedule is complete when the time ends.
    There is at least one step.

    Args:
        rates: the learning rate of every step.
        first: number of the first step; more than 0 for a resumed run.
        elapsed: seconds since the start of the training.
        seconds: time limit.
    """
    for step in range(first, len(rates)):
        place = step if seconds is None else max(step, int(len(rates) * elapsed() / seconds))
        if place >= len(rates) and step:
            return
        yield rates[min(place, len(rates) - 1)]
