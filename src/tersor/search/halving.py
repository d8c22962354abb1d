"""Successive halving: train promising candidates for a while, train the better ones further, and repeat.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016. The
resource is time, not steps, since a step of a fast network costs less: each candidate of a rung gets the same seconds.
Each rung is a training stage of its own, from the weights of the rung before. The last rungs have one candidate and
most of the time. The candidate of the very last one is chosen again from all: if the favourite is already within the
budget, a faster one can have the rest of the time.
"""

from __future__ import annotations

import itertools
import math

from tersor import recipe as recipes
from tersor.core.errors import InputError
from tersor.recipe import Stage
from tersor.search.candidate import QUANTIZE, Candidate
from tersor.search.folder import Rung
from tersor.search.plan import LEAST_FIRST, RUNG_SIZES, RUNGS
from tersor.search.promotion import entrants, promoted
from tersor.search.search_context import Search
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
            state.rungs.append(_rung(search, number))
            search.save()
        rung = state.rungs[number - 1]
        if not rung.members:
            return
        for place, (name, training) in enumerate(rung.members.items()):
            if search.study.find(by_name[name], training) is None and name not in search.study.failed:
                end = search.clock.used + _available(search)
                seconds = min(end, rung.until or end) - search.clock.used
                _train(search, by_name[name], training, seconds / (len(rung.members) - place), last=rung.until is None)


def _worthwhile(search: Search) -> bool:
    """Whether the time left is enough for another training."""
    return _available(search) > max(_LEAST_SHARE * search.clock.total, 3 * search.folder.state.costs.overhead)


def _available(search: Search) -> float:
    """Seconds for training: those left, without the reserve for the end."""
    reserve = search.folder.state.costs.reserve(search.clock.total, len(search.tested_at_the_end()) + 1)
    return max(0.0, search.clock.left - reserve)


def _rung(search: Search, number: int) -> Rung:
    """The candidates of a rung, and its end."""
    state, available = search.folder.state, _available(search)
    share = RUNGS[number - 1] if number <= len(RUNGS) else 1.0
    short = number == len(RUNGS) and (1 - share) * available < _LEAST_OVERHEADS * state.costs.overhead
    last = number > len(RUNGS) or state.finished or short
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
    """The latest training of each candidate; of a finished search only the last one, which has its checkpoints."""
    rungs = search.folder.state.rungs
    names = rungs[-1].members if search.folder.state.finished else {name for rung in rungs for name in rung.members}
    records = [record for record in search.study.records() if record.rung and record.of.name in names]
    latest = {record.of.name: record for record in sorted(records, key=lambda record: record.rung)}
    return [record for name, record in latest.items() if name not in search.study.failed]


def _train(search: Search, candidate: Candidate, training: int, seconds: float, *, last: bool) -> None:
    """Train a candidate once more; all of its work takes `seconds`. An error is stored as a failed trial."""
    costs, start = search.folder.state.costs, search.clock.used
    before = search.study.find(candidate, training - 1) if training > 1 else None
    trained = [Stage.model_validate(stage) for stage in before.stages] if before else []
    limit = seconds - costs.overhead
    if limit <= 0:
        return
    settled = before is not None and before.point.seconds > limit
    quantizes = last and before is not None and (before.rounding_loss or 0.0) > _ROUNDING
    names = [(f"train-{training}", 1 - _QUANTIZED_SHARE * quantizes)]
    names += [(QUANTIZE, _QUANTIZED_SHARE)] * quantizes
    validation, in_training = None, 0.0
    try:
        model = search.bench.build(candidate)
        for name, share in names:
            steps = max(1, int(_HEADROOM * share * limit / max(costs.step, 1e-9)))
            stage = search.bench.stage(candidate, name, steps, model, settled=settled)
            model, made = search.bench.train(candidate, (*trained, stage), share * limit)
            trained.append(as_made(stage, made.steps))
            validation = made.validation_score
            in_training += made.training_seconds or 0.0
        with search.timed("export"):
            file = search.folder.point_file(f"{candidate.name}-{training}")
            exported = search.bench.export(candidate, model, file, quantized=quantizes)
    except InputError as error:
        search.study.fail(candidate, training, str(error))
        search.bar.tell(f"{candidate}: {error}")
        return
    costs.attach = max(0.0, search.clock.used - start - in_training - costs.export)
    record = search.record(
        candidate,
        exported,
        rung=training,
        steps=sum(stage.steps for stage in trained),
        seconds=in_training + (before.point.seconds if before else 0.0),
        stages=tuple(stage.model_dump(mode="json", exclude_defaults=True) for stage in trained),
        rounding_loss=None if validation is None else validation - exported.validation,
    )
    search.study.add(record)
    search.add(record.point, recipes.write(search.bench.recipe(candidate, candidate.stages(trained))))
    search.bar.tell(_described(search, record))


def _described(search: Search, record: Record) -> str:
    point = record.point
    times = ", ".join(f"{value:.3g} ms at batch {size}" for size, value in point.latency_ms.items())
    drop = point.validation - search.reference
    return (
        f"{point.description}, {point.steps} steps: {point.validation:.2f} % "
        f"({drop:+.2f}, standard error {point.drop_error:.2f}), {times}"
    )
