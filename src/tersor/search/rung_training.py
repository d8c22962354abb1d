"""The training runs of a rung: planned, run here or in workers, then exported, measured and stored as trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from tersor.core.errors import InputError
from tersor.evaluation.results import StageRecord
from tersor.recipe import Stage
from tersor.search.candidate import QUANTIZE, Candidate
from tersor.search.further_removal import stages_before
from tersor.search.search_context import Search
from tersor.search.search_metric import in_percent
from tersor.search.state import Rung
from tersor.search.study import Record
from tersor.search.training_stage import as_made
from tersor.search.trial import QUANTIZED_SHARE, Training, train
from tersor.search.workers import LostWorkerError, Workers

_ROUNDING = 0.4
"""If quantization costs more points than this, the last training run ends with quantization-aware training."""
_HEADROOM = 10
"""Limit on the steps of a training run, relative to the original's in the same time; usually time ends it first."""
_MOST_STEPS = 10**6
"""Limit on the steps where the original cannot be trained, so that its step has no time."""


def train_candidates(
    search: Search, rung: Rung, candidates: Sequence[Candidate], workers: Workers | None = None
) -> None:
    """Train candidates until the rung ends, each for the same time."""
    if workers is not None:
        _train_in_workers(search, workers, rung, candidates)
        return
    for place, candidate in enumerate(candidates):
        _train(search, candidate, rung, _left(search, rung) / (len(candidates) - place))


def seconds_to_train(search: Search) -> float:
    """Seconds for training: those left, without the reserve for the end."""
    return max(0.0, search.clock.left - search.reserve(more=1))


def rounds_badly(record: Record) -> bool:
    """Whether quantization costs a candidate so much that its last training run is quantization-aware."""
    return (record.rounding_loss or 0.0) > _ROUNDING


def _left(search: Search, rung: Rung) -> float:
    end = search.clock.used + seconds_to_train(search)
    return min(end, rung.until or end) - search.clock.used


def _train(search: Search, candidate: Candidate, rung: Rung, seconds: float) -> None:
    """Train a candidate once more; all of its work takes `seconds`. An error is stored as a failed trial."""
    limit = seconds - search.folder.state.costs.overhead - _removal_seconds(search, candidate, rung)
    if limit <= 0:
        return
    start, resumed = search.clock.used, candidate.name in rung.planned
    try:
        training = _training(search, candidate, rung, limit)
        model, made = train(search.bench, candidate, training, lambda: search.clock.used)
        _add(search, candidate, rung, training, model, made)
    except InputError as error:
        _fail(search, candidate, rung, str(error))
        return
    if not resumed and candidate.name not in rung.unsurveyed:
        costs, in_training = search.folder.state.costs, sum(record.training_seconds or 0.0 for record in made)
        other = max(0.0, search.clock.used - start - in_training)
        costs.attach = max(0.0, other - costs.export - costs.latency)
        costs.training = (costs.training + other) / 2 if costs.training else other


def _removal_seconds(search: Search, candidate: Candidate, rung: Rung) -> float:
    """Seconds for removing branches and channels of an unsurveyed candidate, which is the work of its survey."""
    return search.folder.state.costs.survey if candidate.name in rung.unsurveyed else 0.0


def _train_in_workers(search: Search, workers: Workers, rung: Rung, candidates: Sequence[Candidate]) -> None:
    """Train candidates in the workers until the rung ends; then export and measure them here."""
    costs, rounds = search.folder.state.costs, math.ceil(len(candidates) / workers.count)
    last = min(len(candidates), workers.count)  # the others are exported and measured while these are trained
    seconds = _left(search, rung) - last * (costs.export + costs.latency)
    seconds -= sum(_removal_seconds(search, each, rung) for each in candidates)  # here, one after another
    limit = seconds / max(1, rounds) - costs.attach
    if limit <= 0:
        return
    trainings: dict[Candidate, Training] = {}
    for candidate in candidates:
        try:
            trainings[candidate] = _training(search, candidate, rung, limit)
        except InputError as error:
            _fail(search, candidate, rung, str(error))
    for found in workers.train(trainings):
        search.bar.advance()
        if found is None:
            continue
        candidate, error = found
        if error is not None:
            _fail(search, candidate, rung, str(error), lost=isinstance(error, LostWorkerError))
            continue
        try:
            model, made = train(search.bench, candidate, trainings[candidate])  # from the checkpoints of the worker
            _add(search, candidate, rung, trainings[candidate], model, made)
        except InputError as failure:
            _fail(search, candidate, rung, str(failure))


def _training(search: Search, candidate: Candidate, rung: Rung, limit: float) -> Training:
    """A training run of `limit` seconds; its plan is stored."""
    training = rung.members[candidate.name]
    before = _before(search, candidate, training)
    trained = [] if before is None else stages_before(before)
    if before is not None and before.of != candidate:
        search.bench.start_from(candidate, before.of)
        trained += candidate.last_removal
    if candidate.name not in rung.planned:
        planned = _planned(search, candidate, training, before, trained, limit, last=rung.until is None)
        rung.planned[candidate.name] = [_plain(stage) for stage in planned]
        search.save()
    stages = [Stage.model_validate(stage) for stage in rung.planned[candidate.name]]
    return Training(trained, stages, limit)


def _before(search: Search, candidate: Candidate, training: int) -> Record | None:
    """The trial that a training run continues: of the same candidate, or of its parent before the last removal."""
    if training == 1:
        return None
    return search.study.find(candidate, training - 1) or search.study.find(candidate.parent, training - 1)


def _add(
    search: Search, candidate: Candidate, rung: Rung, training: Training, model: nn.Module, made: list[StageRecord]
) -> None:
    """Export and measure a trained candidate, and add its trial."""
    number = rung.members[candidate.name]
    before = _before(search, candidate, number)
    trained = [*training.trained]
    trained += [as_made(stage, record.steps) for stage, record in zip(training.stages, made, strict=True)]
    steps = sum(stage.steps for stage in trained)
    with search.timed("export"):
        file = search.folder.point_file(candidate.trained(steps))
        exported = search.bench.export(candidate, model, file, quantized=_rounds(trained))
    validation = made[-1].validation_score
    if validation is not None:
        validation = in_percent(search.bench.experiment.task, validation)
    in_training = sum(record.training_seconds or 0.0 for record in made)
    with search.timed("latency"):
        record = search.record(
            candidate,
            exported,
            rung=number,
            steps=steps,
            seconds=in_training + (before.point.seconds if before else 0.0),
            stages=tuple(_plain(stage) for stage in trained),
            rounding_loss=None if validation is None else validation - exported.validation,
        )
    search.study.add(record)
    del rung.planned[candidate.name]
    search.add(record.point, search.recipe_text(candidate, candidate.stages(trained)))
    search.bar.tell(_described(search, record))


def _fail(search: Search, candidate: Candidate, rung: Rung, reason: str, *, lost: bool = False) -> None:
    """Store the failed training; a `lost` one has no trial, so that a resumed search repeats it."""
    if lost:
        search.study.failed[candidate.name] = reason
        search.bar.tell(f"{candidate}: {reason}")
    else:
        search.study.fail(candidate, rung.members[candidate.name], reason)
        search.bar.tell(f"{candidate}: training or export failed: {reason}")


def _planned(
    search: Search,
    candidate: Candidate,
    training: int,
    before: Record | None,
    trained: Sequence[Stage],
    limit: float,
    *,
    last: bool,
) -> list[Stage]:
    """The stages of a training run of `limit` seconds. A resumed run repeats them, although less time is left."""
    quantizes = last and before is not None and (rounds_badly(before) or _rounds(_stages(before)))
    names = [(f"train-{training}", 1 - QUANTIZED_SHARE * quantizes)]
    names += [(QUANTIZE, QUANTIZED_SHARE)] * quantizes
    settled = before is not None and before.of == candidate and before.point.seconds > limit
    step, model = max(search.folder.state.costs.step, 1e-9), search.bench.build(candidate, trained)
    return [
        search.bench.stage(
            candidate, name, max(1, min(_MOST_STEPS, int(_HEADROOM * share * limit / step))), model, settled=settled
        )
        for name, share in names
    ]


def _stages(record: Record | None) -> list[Stage]:
    return [Stage.model_validate(stage) for stage in record.stages] if record else []


def _rounds(stages: Sequence[Stage]) -> bool:
    return any(stage.name == QUANTIZE for stage in stages)


def _plain(stage: Stage) -> dict[str, Any]:
    return stage.model_dump(mode="json", exclude_defaults=True)


def _described(search: Search, record: Record) -> str:
    point = record.point
    drop = point.validation - search.reference
    change = f"{drop:+.2f}, standard error {point.drop_error:.2f}"
    return f"{point.name}: {point.validation:.2f} % ({change}), {point.latencies}"
