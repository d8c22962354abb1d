"""Successive halving: train promising candidates for a while, train the better ones further, and repeat.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016. The
resource is time, not steps, since a step of a fast network costs less: each candidate of a rung gets the same seconds.
Each rung is a training stage of its own, from the weights of the rung before. The last rungs have one candidate and
most of the time. The candidate of the very last one is chosen again from all: if the best one is already within the
budget, a faster one can have the rest of the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from tersor.core.errors import InputError
from tersor.evaluation.results import StageRecord
from tersor.recipe import Stage
from tersor.search.candidate import QUANTIZE, Candidate
from tersor.search.plan import LEAST_FIRST, RUNG_SIZES, RUNGS
from tersor.search.promotion import entrants, promoted
from tersor.search.search_context import Search
from tersor.search.search_metric import in_percent
from tersor.search.state import Rung
from tersor.search.study import Record
from tersor.search.training_stage import as_made

_ROUNDING = 0.4
"""If quantization costs more points than this, the last training ends with quantization-aware training."""
_QUANTIZED_SHARE = 0.25
_LEAST_SHARE = 0.03
_LEAST_OVERHEADS = 10
"""A training is divided if its second part has at least so many times the seconds of attaching and exporting."""
_HEADROOM = 10
"""Limit on the steps of a training, relative to the original's in the same time; usually the time ends it first."""
_MOST_STEPS = 10**6
"""Limit on the steps where the original cannot be trained, so that its step has no time."""


def halve(search: Search) -> None:
    """Train candidates in rungs until the time is used up.

    If a finished search gets more time, its last candidate is trained further.
    """
    state = search.folder.state
    by_name = {record.of.name: record.of for record in search.study.records()}
    for number in itertools.count(1):
        if len(state.rungs) < number:
            if state.rungs and state.rungs[-1].until is None and not _worthwhile(search):
                return
            made = _rung(search, number)
            if not made.members:
                if state.costs.entrants(_available(search)):
                    search.bar.tell("no more training: no promising candidate can be improved by it")
                return
            state.rungs.append(made)
            search.save()
        rung = state.rungs[number - 1]
        for place, (name, training) in enumerate(rung.members.items()):
            if search.study.find(by_name[name], training) is None and name not in search.study.failed:
                end = search.clock.used + _available(search)
                seconds = min(end, rung.until or end) - search.clock.used
                _train(search, by_name[name], rung, seconds / (len(rung.members) - place))


def _worthwhile(search: Search) -> bool:
    """Whether the time left is enough for another training."""
    return _available(search) > max(_LEAST_SHARE * search.clock.total, 3 * search.folder.state.costs.overhead)


def _available(search: Search) -> float:
    """Seconds for training: those left, without the reserve for the end."""
    return max(0.0, search.clock.left - search.reserve(more=1))


def _rung(search: Search, number: int) -> Rung:
    """The candidates of a rung, and its end."""
    state, available = search.folder.state, _available(search)
    share = RUNGS[number - 1] if number <= len(RUNGS) else 1.0
    short = number == len(RUNGS) and (1 - share) * available < _LEAST_OVERHEADS * state.costs.overhead
    last = number > len(RUNGS) or state.extended or short
    if number == 1:
        seconds = max(share, LEAST_FIRST) * available
        count = state.costs.entrants(seconds) or min(1, state.costs.entrants(available))
        chosen = entrants(search, count)
        share = max(share, min(LEAST_FIRST, state.costs.least * len(chosen) / max(available, 1e-9)))
    else:
        largest = RUNG_SIZES[min(number, len(RUNG_SIZES)) - 1]
        count = max(1, min(largest, state.costs.entrants(share * available)))
        left = available * (math.prod(1 - each for each in RUNGS[number - 1 : -1]) if count > 1 else 1.0)
        chosen = promoted(search, _trained(search), count, left, last=last)
    last = last or (len(chosen) == 1 and number < len(RUNGS))
    members = {record.of.name: record.rung + 1 for record in chosen}
    return Rung(members=members, until=None if last else search.clock.used + share * available)


def _trained(search: Search) -> list[Record]:
    """The latest training of each candidate; of an extended search only the last one, which has its checkpoints."""
    rungs = search.folder.state.rungs
    names = rungs[-1].members if search.folder.state.extended else {name for rung in rungs for name in rung.members}
    records = [record for record in search.study.records() if record.rung and record.of.name in names]
    latest = {record.of.name: record for record in sorted(records, key=lambda record: record.rung)}
    return [record for name, record in latest.items() if name not in search.study.failed]


def _train(search: Search, candidate: Candidate, rung: Rung, seconds: float) -> None:
    """Train a candidate once more; all of its work takes `seconds`. An error is stored as a failed trial."""
    costs, start, training = search.folder.state.costs, search.clock.used, rung.members[candidate.name]
    before = search.study.find(candidate, training - 1) if training > 1 else None
    limit = seconds - costs.overhead
    if limit <= 0:
        return
    resumed = candidate.name in rung.planned
    try:
        if not resumed:
            planned = _planned(search, candidate, training, before, limit, last=rung.until is None)
            rung.planned[candidate.name] = [_plain(stage) for stage in planned]
            search.save()
        stages = [Stage.model_validate(stage) for stage in rung.planned[candidate.name]]
        trained = _without_rounding(before)
        model, made = _run(search, candidate, trained, stages, limit)
        trained += [as_made(stage, record.steps) for stage, record in zip(stages, made, strict=True)]
        steps = sum(stage.steps for stage in trained)
        with search.timed("export"):
            file = search.folder.point_file(candidate.trained(steps))
            exported = search.bench.export(candidate, model, file, quantized=_rounds(trained))
        in_training = sum(record.training_seconds or 0.0 for record in made)
        if not resumed:
            costs.attach = max(0.0, search.clock.used - start - in_training - costs.export)
        validation = made[-1].validation_score
        if validation is not None:
            validation = in_percent(search.bench.experiment.task, validation)
        with search.timed("latency"):
            record = search.record(
                candidate,
                exported,
                rung=training,
                steps=steps,
                seconds=in_training + (before.point.seconds if before else 0.0),
                stages=tuple(_plain(stage) for stage in trained),
                rounding_loss=None if validation is None else validation - exported.validation,
            )
    except InputError as error:
        search.study.fail(candidate, training, str(error))
        search.bar.tell(f"{candidate}: {error}")
        return
    search.study.add(record)
    del rung.planned[candidate.name]
    search.add(record.point, search.recipe_text(candidate, candidate.stages(trained)))
    search.bar.tell(_described(search, record))


def _planned(
    search: Search, candidate: Candidate, training: int, before: Record | None, limit: float, *, last: bool
) -> list[Stage]:
    """The stages of a training of `limit` seconds. A resumed training repeats them, although less time is left."""
    rounds_badly = before is not None and (before.rounding_loss or 0.0) > _ROUNDING
    quantizes = last and (rounds_badly or _rounds(_stages(before)))
    names = [(f"train-{training}", 1 - _QUANTIZED_SHARE * quantizes)]
    names += [(QUANTIZE, _QUANTIZED_SHARE)] * quantizes
    settled = before is not None and before.point.seconds > limit
    step, model = max(search.folder.state.costs.step, 1e-9), search.bench.build(candidate)
    return [
        search.bench.stage(
            candidate, name, max(1, min(_MOST_STEPS, int(_HEADROOM * share * limit / step))), model, settled=settled
        )
        for name, share in names
    ]


def _run(
    search: Search, candidate: Candidate, trained: Sequence[Stage], stages: Sequence[Stage], limit: float
) -> tuple[nn.Module, list[StageRecord]]:
    """Train in all `stages`, after those that are `trained`; the network, and a record for each of them."""
    results: list[tuple[nn.Module, StageRecord]] = []
    for number in range(1, len(stages) + 1):
        start = search.clock.used
        seconds = limit * (1 - _QUANTIZED_SHARE * (number < len(stages)))
        results.append(search.bench.train(candidate, (*trained, *stages[:number]), seconds))
        limit -= min(seconds, search.clock.used - start)  # a stage that ended before an interruption takes no time
    return results[-1][0], [record for _, record in results]


def _stages(record: Record | None) -> list[Stage]:
    return [Stage.model_validate(stage) for stage in record.stages] if record else []


def _without_rounding(record: Record | None) -> list[Stage]:
    """The trained stages but those that quantize: the next training goes on from the float network."""
    return [stage for stage in _stages(record) if stage.name != QUANTIZE]


def _rounds(stages: Sequence[Stage]) -> bool:
    return any(stage.name == QUANTIZE for stage in stages)


def _plain(stage: Stage) -> dict[str, Any]:
    return stage.model_dump(mode="json", exclude_defaults=True)


def _described(search: Search, record: Record) -> str:
    point = record.point
    times = ", ".join(f"{value:.3g} ms at batch {size}" for size, value in point.latency_ms.items())
    drop = point.validation - search.reference
    return f"{point.name}: {point.validation:.2f} % ({drop:+.2f}, standard error {point.drop_error:.2f}), {times}"
