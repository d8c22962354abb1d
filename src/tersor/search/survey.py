"""The work before any training: the feasible range, and the survey of candidates after reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from tersor.core.errors import InputError
from tersor.evaluation.costs import costs
from tersor.evaluation.multiply_peak import INTEGERS
from tersor.evaluation.session import installed_runtimes, open_session
from tersor.evaluation.standard_error import SEEN, error_of_difference
from tersor.search.candidate import Candidate
from tersor.search.end_costs import measure_end
from tersor.search.folder import BASELINES, UNCHANGED
from tersor.search.front import Point
from tersor.search.plan import survey_seconds
from tersor.search.search_context import Search
from tersor.search.space import Space, candidate_of
from tersor.search.study import Record

ORIGINAL, FLOAT32 = "original", "original-float32"
_PACE_STEPS = 3
_CHECKPOINT_SECONDS, _MOST_STEPS = 30.0, 200
_PERHAPS_SEEN = 2.0
"""Standard errors from which the original may have been trained on the validation images; from `SEEN` on, it was."""
_FOR_ONE = 0.5
"""The survey lasts long enough for one candidate, if that takes at most this share of the time left."""
_MOST_OF_IT = 0.9
"""A candidate is surveyed if at least this share of its expected time is left for the survey."""
_MOST_KNOWN = 20
"""The survey ends after this many proposals in a row that were tried before."""


def feasible_range(search: Search) -> None:
    """Export and measure the free baselines: float32, the default precision of each runtime, and 8 bits in each.

    A usable `model.onnx` exists as soon as the original is exported.
    """
    file = _export_original(search)
    state = search.folder.state
    if state.seen is None:
        state.seen = _seen(search, file)
        state.costs.test /= 1 + state.seen
    if state.seen:
        search.bench = search.bench.choosing_on_test_images()
    if not state.baselines:
        with search.timed("export"):
            integers = _integers(search)
        state.baselines = _measured(search, file, integers | _integers_elsewhere(search))
    state.costs.runs = sum(state.baselines[0].latency_ms.values()) / 1000
    search.measurement.compare_with(file, state.baselines[0].latency_ms)
    for point in state.baselines:
        if point.runtime == search.runtime and point.name != FLOAT32:
            _add_free(search, point)
    if not state.costs.step:
        search.save()
        try:
            with search.timed("attach"):
                state.costs.step = search.bench.pace(search.bench.experiment.model, _PACE_STEPS)
            state.costs.attach -= _PACE_STEPS * state.costs.step
        except InputError as error:
            search.bar.tell(f"warning: the original cannot be trained: {error}")
    measure_end(search, file)
    if state.costs.step:
        steps = int(_CHECKPOINT_SECONDS / state.costs.step)
        search.bench = replace(search.bench, checkpoint_every=min(_MOST_STEPS, max(1, steps)))
    search.save()


def _seen(search: Search, file: Path) -> bool:
    """Whether the original was trained on the validation images: it is much better on them than on the test images.

    Drops on such images are misleading: the original has memorized them, and a new network has not.
    """
    bench = search.bench
    with search.timed("test"):
        test = bench.test_metric(Candidate(), file)
    images = len(bench.validation.images), len(bench.experiment.data.test)
    validation = bench.measured(file, search.runtime).metric
    error = error_of_difference((validation, test), images)
    seen = validation - test > SEEN * error
    scores = f"{bench.experiment.task.metric} {validation:.2f} % there, {test:.2f} % on the test images"
    if seen:
        search.bar.tell(
            f"the original was probably trained on the validation images: {scores}. Half of the test images are used "
            "for validation instead, the other half for the results."
        )
    elif validation - test > _PERHAPS_SEEN * error:
        search.bar.tell(
            f"the original may have been trained on the validation images: {scores}. The difference is too small to "
            "tell, so they are still used for validation."
        )
    return seen


def _export_original(search: Search) -> Path:
    """The file of the original; it is `model.onnx` until there is a better one."""
    file = search.folder.path / UNCHANGED
    if not file.is_file():
        search.bench.write(search.bench.experiment, search.bench.experiment.model, file)
        search.folder.provide(file)
    return file


def _integers(search: Search) -> dict[str, Path]:
    """The file of the 8-bit original, by runtime; empty where that is not possible."""
    candidate, file = Candidate(), search.folder.path / BASELINES / f"{INTEGERS}.onnx"
    try:
        search.bench.export(candidate, search.bench.build(candidate), file)
    except InputError as error:
        search.study.fail(candidate, 0, str(error))
        search.bar.tell(f"warning: the original cannot be quantized: {error}")
        return {}
    return {search.runtime: file}


def _integers_elsewhere(search: Search) -> dict[str, Path]:
    """The same for the other installed runtimes: the placement of the quantizers depends on the runtime."""
    files: dict[str, Path] = {}
    for runtime in installed_runtimes():
        if runtime == search.runtime:
            continue
        candidate, file = Candidate(), search.folder.path / BASELINES / f"{INTEGERS}-{runtime}.onnx"
        recipe = search.bench.experiment.recipe
        target = recipe.target.model_copy(update={"runtime": runtime})
        experiment = replace(search.bench.experiment, recipe=recipe.model_copy(update={"target": target}))
        bench = replace(search.bench, experiment=experiment)
        with suppress(InputError):
            bench.export(candidate, bench.build(candidate), file)
            files[runtime] = file
    return files


def _measured(search: Search, original: Path, integers: Mapping[str, Path]) -> list[Point]:
    """All free baselines, measured together; `integers` are the 8-bit files, by runtime."""
    bench, runtime = search.bench, search.runtime
    files: dict[str, tuple[Path, str, Literal["float32"] | None]] = {ORIGINAL: (original, runtime, None)}
    files |= {f"{ORIGINAL}-{each}": (original, each, None) for each in installed_runtimes() if each != runtime}
    if open_session(original, runtime).precision != "float32":
        files[FLOAT32] = (original, runtime, "float32")
    for each, path in integers.items():
        files[Candidate().name if each == runtime else f"{Candidate().name}-{each}"] = (path, each, None)
    openers = {name: partial(open_session, path, each, precision=kind) for name, (path, each, kind) in files.items()}
    with search.timed("finish"):
        latencies = search.measurement.baselines(openers, ORIGINAL)
    macs = costs(bench.experiment.model, next(iter(bench.validation)).images[:1]).macs
    measured = {name: bench.measured(path, each, kind) for name, (path, each, kind) in files.items()}
    if (right := measured[ORIGINAL].right) is not None:
        search.folder.keep_original_right(right)
    return [
        Point(
            name=name,
            description="the 8-bit original" if path in integers.values() else "the original",
            file=search.folder.relative(path),
            runtime=each,
            precision=INTEGERS if path in integers.values() else openers[name]().precision,
            free=True,
            validation=measured[name].metric,
            drop_error=0.0 if name == ORIGINAL else search.drop_error(measured[name].right, measured[name].metric),
            latency_ms=latencies[name].ms,
            latency_error=latencies[name].error,
            bytes=path.stat().st_size,
            macs=macs,
        )
        for name, (path, each, _) in files.items()
    ]  # fmt: skip


def _add_free(search: Search, point: Point) -> None:
    candidate = Candidate()
    search.add(point, search.recipe_text(candidate, (candidate.rounding,)))
    if point.name == candidate.name and search.study.find(candidate) is None:
        search.study.add(Record(candidate=candidate.parameters, rung=0, point=point))


def survey(search: Search, space: Space, *, proposals: bool = True) -> None:
    """Build, export, validate and time candidates until the time of the survey is used up.

    Candidates that the user named are tried first. They may take all of the time, including some of the reserve.

    Args:
        search: the search.
        space: the candidates.
        proposals: whether to try proposals of the sampler after the candidates that are always tried.
    """
    state = search.folder.state
    state.costs.survey = state.costs.survey or state.costs.export
    if state.survey_until is None:
        left = max(0.0, search.clock.left - search.reserve())
        state.survey_until = search.clock.used + max(survey_seconds(left), min(state.costs.survey, _FOR_ONE * left))
        search.save()
    for candidate in search.untried:
        if search.clock.left >= max(state.costs.survey, search.reserve()):
            _try(search, candidate)
            search.bar.tell(_described(search, candidate))
    for candidate in space.first():
        if not _time_for_another(search):
            return
        if search.study.find(candidate) is None and candidate.name not in search.study.failed:
            _try(search, candidate)
    known = 0
    while proposals and space.samples and known < _MOST_KNOWN and _time_for_another(search):
        trial, parameters = search.study.suggest(space.distributions())
        candidate = candidate_of(parameters)
        found = search.study.find(candidate)
        if found is None and candidate.name not in search.study.failed:
            found, known = _try(search, candidate, store=False), 0
        else:
            known += 1
        search.study.tell(trial, found)


def _described(search: Search, candidate: Candidate) -> str:
    """What the survey found about a candidate that the user named."""
    found = search.study.find(candidate)
    if found is None:
        return f"{candidate} failed: {search.study.failed[candidate.name]}"
    return _before_training(found)


def _before_training(record: Record) -> str:
    return f"{record.of}: {record.point.validation:.2f} % before training, {record.point.latencies}"


def _time_for_another(search: Search) -> bool:
    state = search.folder.state
    assert state.survey_until is not None
    return search.clock.used + _MOST_OF_IT * state.costs.survey <= state.survey_until


def _try(search: Search, candidate: Candidate, *, store: bool = True) -> Record | None:
    """Survey one candidate; None if it cannot be built or exported."""
    usable, costs = search.is_trained(candidate), search.folder.state.costs
    estimated = all(record.of == Candidate() for record in search.study.records())
    before = costs.survey
    try:
        with search.timed("survey"):
            model = search.bench.build(candidate)
            file = search.folder.point_file(candidate.name) if usable else search.folder.untrained_file()
            with search.timed("export"):
                exported = search.bench.export(candidate, model, file)
            record = search.record(candidate, exported)
    except InputError as error:
        search.study.fail(candidate, 0, str(error))
        return None
    if not estimated:  # the first export, which is the estimate, also loads libraries
        costs.survey = (before + costs.survey) / 2  # so that a single slow moment of the machine does not decide
    if store:
        search.study.add(record)
    if usable:
        search.add(record.point, search.recipe_text(candidate, candidate.stages(())))
        if search.best == record.point and candidate not in search.named:
            search.bar.tell(f"best so far, {_before_training(record)}")
    return record


def space_of(search: Search, students: list[str], pixels: list[int]) -> Space:
    """The space of the original and its students; bits below 8 are tried where the size is limited."""
    bench, bits = search.bench, ("8", "mixed", "4") if search.budget.megabytes is not None else ("8",)
    try:
        branches, prunable = len(bench.branches(Candidate())), True
    except InputError as error:
        kinds = "students, image sizes and bits" if len(bits) > 1 else "students and image sizes"
        search.bar.tell(
            f"neither branches nor channels can be removed from the original, so only {kinds} are tried: {error}"
        )
        branches, prunable = 0, False
    return Space(branches, prunable, students, bits, pixels)
