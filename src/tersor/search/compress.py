"""`tersor.compress`: runs the phases of a search, and returns the front."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from torch import nn

from tersor.core.errors import InputError, counted
from tersor.core.progress import ProgressReporter, WarningProgress
from tersor.core.resources import enough_memory, writable
from tersor.core.target import Runtime
from tersor.data import Splits
from tersor.data.loading import sides_of
from tersor.data.mean_and_std import channel_values
from tersor.pipeline.task_arguments import Loss, task_of_both
from tersor.search.candidate import ORIGINAL, Candidate
from tersor.search.candidate_latency import Measurement
from tersor.search.compression_budget import DEFAULT_MINUTES, Budget
from tersor.search.finish import write_front
from tersor.search.folder import DATABASE, LATENCIES, TRIALS, Front, SearchFolder, read_front
from tersor.search.front_page import write_front_page
from tersor.search.halving import halve
from tersor.search.plan import Clock, latency_seconds
from tersor.search.point_evidence import write_evidence
from tersor.search.range_description import describe_range
from tersor.search.request import Request, experiment_of
from tersor.search.rest_of_time import train_and_survey
from tersor.search.result import Result
from tersor.search.search_context import Search, TimeBar
from tersor.search.space import family
from tersor.search.study import Study
from tersor.search.survey import feasible_range, space_of, survey
from tersor.search.tested_points import run_on_test_images
from tersor.search.verdict_line import saturation
from tersor.search.workbench import Workbench
from tersor.search.workers import Placement, started
from tersor.tasks.classification import Classification
from tersor.tasks.functions import FromFunctions
from tersor.tasks.multilabel import Multilabel

_LARGE = 64
"""Image size from which latency is measured at batch 32 instead of 128."""
_LONGER = (
    "`minutes` (`--time`) is the total search time, earlier runs included: to search longer, repeat the same call with "
    "a larger value."
)
_MEMORY = "Close other programs, or use smaller images or a smaller network."


def compress(
    model: nn.Module | str,
    data: Splits | Path | str,
    *,
    weights: Path | str | None = None,
    budget: Budget | None = None,
    runtime: Runtime = "onnxruntime",
    students: Sequence[str] = (),
    pixels: Sequence[int] = (),
    augment: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    task: str = "classification",
    loss: Loss | None = None,
    metric: Any = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | Sequence[int] | None = None,
    validation: float | None = None,
    storage: str | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    out: Path | str | None = None,
    progress: ProgressReporter | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Result:
    """Search for a smaller, faster network within a budget; the same call resumes an interrupted search.

    Args:
        model: a trained network, or its name: resnet56, timm:NAME, package.module:function.
        data: images from `tersor.data.load`, an image folder, a CSV file, the name of a data set, or file.py:function.
        weights: weights file of a `model` that is given by name.
        budget: limits on accuracy, latency, size and search time; by default 1 point lost and 30 minutes.
        runtime: the runtime that files are measured in.
        students: other networks to try, as NAME or NAME=WEIGHTS.
        pixels: further resolutions to try.
        augment: augmentation of the training images; crop_flip by default, flip for boxes, none for grayscale images.
        limit: number of training images; all by default.
        seed: random seed.
        task: what the network is for: classification, segmentation, ..., package.module:Task.
        loss: (outputs, targets) -> scalar tensor, instead of the task's loss. A recipe cannot contain a loss
            function: to repeat the training with `tersor run`, write a task class.
        metric: (outputs, targets) -> number from 0 to 1, where higher is better, or a torchmetrics Metric.
        channels: number of channels, 3 by default. Pass 1 to read the images as grayscale; see `tersor.data.load` for
            this and the next three.
        mean: mean of each channel in [0, 1]; by default from the weights file, else computed from the training images.
        std: standard deviation of each channel in [0, 1].
        image_size: height and width in pixels, or one number for both.
        validation: fraction of the training images to hold out, on which candidates are compared; by default 0.1, or
            0.25 with fewer than 2,000 training images. Not used if the data has validation images.
        storage: SQLAlchemy URL of the trials; `study.db` in the folder by default.
        workers: number of Ray processes that train candidates at the same time; without it, this process trains them.
        ray_address: address of a Ray cluster for the workers; by default they run on this machine. Paths in the
            arguments must exist on all machines.
        out: the folder, `runs/compress` by default.
        progress: receives the progress; `tersor.progress_bars.Bars` draws it. Without it, only warnings are issued.
        now: a function that returns the current time in seconds.

    Raises:
        InputError: an argument, the network or the data cannot be used.
        KeyboardInterrupt: Ctrl-C; the folder then holds the best network so far.
    """
    budget, out = budget or Budget(), Path(out or "runs/compress")
    progress = progress or WarningProgress()
    if not isinstance(budget, Budget):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"budget is of type {type(budget).__name__}. Pass tersor.Budget(max_drop=0.5, minutes=45).")
    placement = _placement(workers, ray_address)
    begun = now()
    request = Request(
        model,
        data,
        None if weights is None else Path(weights),
        runtime,
        _names_of(students),
        _listed("pixels", pixels, "numbers"),
        augment,
        limit,
        seed,
        task,
        loss,
        metric,
        channels,
        None if mean is None else channel_values("mean", mean),
        None if std is None else channel_values("std", std),
        image_size if isinstance(image_size, int) else sides_of(image_size),
        validation,
    )
    folder = SearchFolder(out, {**request.arguments, "budget": str(budget)})
    minutes = budget.minutes or DEFAULT_MINUTES
    if folder.state.finished and minutes <= folder.state.minutes:
        progress.say(f"{out}: the search is complete. {_LONGER}")
        return Result(out, read_front(out))
    if folder.changed:
        progress.say(
            f"{out} holds an interrupted search {'; '.join(folder.changed)}. It had measured nothing, so the search "
            "starts from scratch."
        )
    clock = Clock(minutes, folder.state.used + now() - begun, now)
    with enough_memory(_MEMORY), writable(out), folder.held():
        search = _search(request, folder, budget, clock, storage, progress)
        return Result(out, _run(search, request, placement))


def _listed(name: str, given: object, kind: str) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"{name} is {given!r}. Pass a list of {kind}: [{given!r}].")
    return tuple(cast("Iterable[Any]", given))


def _names_of(students: object) -> tuple[str, ...]:
    names = _listed("students", students, "names")
    if other := [each for each in names if not isinstance(each, str)]:
        raise InputError(
            f"students contains an object of type {type(other[0]).__name__}. Pass names, such as "
            "'my_networks.py:build': a student is built anew for each training run."
        )
    return names


def _placement(workers: int | None, address: str | None) -> Placement | None:
    if workers is None and address is not None:
        raise InputError(
            "ray_address needs workers: write the number of processes too, such as workers=4 (`--workers 4`)."
        )
    return None if workers is None else Placement(workers, address)


def _search(
    request: Request,
    folder: SearchFolder,
    budget: Budget,
    clock: Clock,
    storage: str | None,
    progress: ProgressReporter,
) -> Search:
    """Open everything that a search needs."""
    bar = TimeBar(progress, clock)
    students = request.weights_of_students()
    experiment = experiment_of(request, progress)
    given = list(students)
    task = experiment.task.base if isinstance(experiment.task, FromFunctions) else experiment.task
    classifies = isinstance(task, Classification | Multilabel)
    for name in family(min(experiment.data.train.size)) if classifies else []:
        students.setdefault(name, None)
    bench = Workbench(experiment, students, folder.path / TRIALS, bar)
    _check_students(bench, given)
    database = storage or f"sqlite:///{(folder.path / DATABASE).absolute()}"
    study = Study(database, folder.state.study, [ORIGINAL, *students], request.seed)
    sizes = sorted(budget.latency_ms) or [1, 128 if min(experiment.data.train.size) < _LARGE else 32]
    example = next(iter(bench.validation)).only_images[:1].numpy()
    seconds = latency_seconds(clock.total)
    measurement = Measurement(folder.path / LATENCIES, request.runtime, example, sizes, seconds)
    named = [*map(Candidate, given), *(Candidate(pixels=size) for size in dict.fromkeys(request.pixels))]
    return Search(bench, study, folder, clock, budget, measurement, bar, named=named)


def _check_students(bench: Workbench, names: Sequence[str]) -> None:
    """Build the user's students, and compare their outputs for two images with those of the original.

    Raises:
        InputError: a student cannot be built, or its outputs do not fit.
    """
    images = next(iter(bench.validation)).images[:2]
    for name in names:
        try:
            task_of_both(bench.experiment.task, bench.student(name), bench.experiment.model, images)
        except InputError as error:
            raise InputError(f"the student {name} cannot be used: {error}") from error


def _run(search: Search, request: Request, placement: Placement | None = None) -> Front:
    """All phases; after Ctrl-C or an error, `front.json` describes what there is."""
    search.restore()
    if search.folder.state.baselines:
        used, measured = search.clock.used / 60, len(search.study.records())
        search.bar.tell(
            f"resuming: {used:.1f} of {search.clock.minutes:.3g} minutes are used; measurements of candidates so far: "
            f"{measured}"
        )
    try:
        feasible_range(search)
        for line in describe_range(search):
            search.bar.tell(line)
        write_front(search, finished=False)
        search.bar.begin()
        space = space_of(search, list(search.bench.students), list(request.pixels))
        survey(search, space, proposals=not search.folder.state.extended)
        measured = len(search.study.records())
        search.bar.tell(f"measured {counted(measured, 'network')} so far; next, the promising ones are trained")
        for line in saturation(write_front(search, finished=False)):
            search.bar.tell(line)
        with started(placement, request, search.bench) if placement else nullcontext() as workers:
            train_and_survey(search, space, lambda last: halve(search, workers, last_resort=last))
    except BaseException:
        if search.original is not None:
            write_front(search, finished=False)
        search.save()
        raise
    tested = run_on_test_images(search)
    made, state = write_front(search, finished=True), search.folder.state
    try:
        write_evidence(search, made, tested)
    finally:  # a killed search repeats it, but an error in it would only come again
        state.finished, state.minutes = True, search.clock.minutes
        search.save()
    made = made.model_copy(update={"minutes_used": search.clock.used / 60})
    search.folder.write_front(made)
    write_front_page(search.folder.path, made)
    search.folder.remove_trials(kept=list(state.rungs[-1].members) if state.rungs else [])
    return made
