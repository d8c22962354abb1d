"""Successive halving: train promising candidates for a while, keep the better ones, and repeat until one is left.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016. The
resource is time, not steps, since a step of a fast network costs less: each candidate of a rung gets the same seconds.
Each rung is a training stage of its own, from the weights of the rung before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from tersor import recipe as recipes
from tersor.core.errors import InputError
from tersor.recipe import Stage
from tersor.search.candidate import QUANTIZE, Candidate
from tersor.search.front import Point, front, rank, violations
from tersor.search.learning_curves import expected
from tersor.search.plan import RUNGS
from tersor.search.search_context import Search
from tersor.search.study import Record
from tersor.search.workbench import as_made

_FASTER = 0.97
"""A candidate is worth training below this share of the latency of the fastest free baseline."""
_ROUNDING = 0.2
"""If quantization costs more points than this, the last training ends with quantization-aware training."""
_QUANTIZED_SHARE = 0.25
_LEAST_SHARE = 0.05
_HEADROOM = 10
"""Limit on the steps of a training, relative to the original's in the same time; usually the time ends it first."""


def halve(search: Search) -> None:
    """Train candidates in rungs until the time is used up.

    If a finished search gets more time, its last candidate is trained further.
    """
    state = search.folder.state
    by_name = {record.of.name: record.of for record in search.study.records()}
    for rung in itertools.count(1):
        if len(state.rungs) < rung:
            if state.rungs and len(state.rungs[-1]) <= 1 and not _worthwhile(search):
                return
            state.rungs.append(_members(search, rung, by_name))
            search.save()
        names = state.rungs[rung - 1]
        if not names:
            return
        end = search.clock.used + _available(search) * (_share(rung) if len(names) > 1 else 1.0)
        for place, name in enumerate(names):
            if search.study.find(by_name[name], rung) is None:
                seconds = (end - search.clock.used) / (len(names) - place)
                _train(search, by_name[name], rung, seconds, last=len(names) == 1)


def _share(rung: int) -> float:
    """The share of the time left for training that a rung of several candidates gets."""
    return RUNGS[rung - 1] if rung <= len(RUNGS) else 1.0


def _worthwhile(search: Search) -> bool:
    """Whether the time left is enough for another training of the last candidate."""
    costs = search.folder.state.costs
    return _available(search) > max(_LEAST_SHARE * search.clock.total, 3 * (costs.attach + costs.export))


def _available(search: Search) -> float:
    """Seconds for training: those left, without the reserve for the end."""
    costs = search.folder.state.costs
    handed = len(front(search.points)) + len(search.folder.state.baselines)
    return max(0.0, search.clock.left - costs.reserve(search.clock.total, handed))


def _members(search: Search, rung: int, by_name: dict[str, Candidate]) -> list[str]:
    """Names of the candidates of a rung."""
    if rung == 1:
        costs, available = search.folder.state.costs, _available(search)
        count = costs.entrants(available * _share(rung)) or min(1, costs.entrants(available))
        return [record.of.name for record in entrants(search, count)]
    before = [search.study.find(by_name[name], rung - 1) for name in search.folder.state.rungs[-1]]
    trained = [record for record in before if record is not None]
    count = 1 if rung > len(RUNGS) else max(1, len(trained) // 2)
    return [record.of.name for record in promoted(search, trained, rung, count)]


def entrants(search: Search, count: int) -> list[Record]:
    """Surveyed candidates to train: the Pareto front and the students, evenly spread over the latencies."""
    records = [record for record in search.study.records() if not record.rung]
    free = min(point.mean_ms for point in search.points if point.free)
    smaller = search.budget.megabytes is not None
    faster = [
        record for record in records if record.point.mean_ms < _FASTER * free or (smaller and record.of.bits != "8")
    ]
    fitting = [record for record in faster if not _misses(search, record.point)] or faster
    inherited = [record for record in fitting if record.of.inherits]
    kept = {point.name for point in front(record.point for record in inherited)}
    inherited = [record for record in inherited if record.point.name in kept]
    students = [record for record in fitting if not record.of.inherits]
    half = count // 2 if inherited and students else 0
    chosen = [*_spread(students, min(len(students), max(half, count - len(inherited))))]
    chosen += _spread(inherited, count - len(chosen))
    if not chosen and count:  # nothing is faster: the original in 8 bits
        chosen = [record for record in records if record.of == Candidate()]
    return chosen


def _misses(search: Search, point: Point) -> bool:
    """Whether a point exceeds the latency or the size, which training does not change."""
    return any(name != "drop" for name in violations(point, search.budget, search.reference))


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """`count` records, evenly spaced in the order of their latency."""
    ordered = sorted(records, key=lambda record: record.point.mean_ms)
    if count >= len(ordered):
        return ordered
    return [ordered[int((place + 0.5) * len(ordered) / count)] for place in range(count)]


def promoted(search: Search, trained: Sequence[Record], rung: int, count: int) -> list[Record]:
    """The candidates of the next rung, by the metric that is expected at the end of the search.

    If `count` is above 1, the best student and the best change of the original are both kept.
    """
    left = _available(search) * math.prod(1 - share for share in RUNGS[rung - 1 :])

    def key(record: Record) -> tuple[float, ...]:
        metric = expected(search, record, record.point.seconds + left)
        return rank(record.point.model_copy(update={"validation": metric}), search.budget, search.reference)

    ordered = sorted(trained, key=key)
    if count > 1:
        firsts = [next((each for each in ordered if each.of.inherits is kind), None) for kind in (True, False)]
        kept = [each for each in firsts if each is not None]
        ordered = sorted(kept, key=key) + [each for each in ordered if each not in kept]
    return ordered[:count]


def _train(search: Search, candidate: Candidate, rung: int, seconds: float, *, last: bool) -> None:
    """Train a candidate for a rung; all of its work takes `seconds`. An error is stored as a failed trial."""
    costs, start = search.folder.state.costs, search.clock.used
    before = search.study.find(candidate, rung - 1)
    trained = [Stage.model_validate(stage) for stage in before.stages] if before else []
    training = seconds - costs.attach - costs.export
    if training <= 0:
        return
    quantizes = last and before is not None and (before.rounding_loss or 0.0) > _ROUNDING
    names = (
        [(f"train-{rung}", 1 - _QUANTIZED_SHARE), (QUANTIZE, _QUANTIZED_SHARE)]
        if quantizes
        else [(f"train-{rung}", 1.0)]
    )
    validation, in_training = None, 0.0
    try:
        model = search.bench.build(candidate)
        for name, share in names:
            steps = max(1, int(_HEADROOM * share * training / max(costs.step, 1e-9)))
            stage = search.bench.stage(candidate, name, steps, model)
            model, made = search.bench.train(candidate, (*trained, stage), share * training)
            trained.append(as_made(stage, made.steps))
            validation = made.validation_score
            in_training += made.training_seconds or 0.0
        with search.timed("export"):
            file = search.folder.point_file(f"{candidate.name}-{rung}")
            exported = search.bench.export(candidate, model, file, quantized=quantizes)
    except InputError as error:
        search.study.fail(candidate, rung, str(error))
        search.bar.tell(f"{candidate}: {error}")
        return
    costs.attach = max(0.0, search.clock.used - start - in_training - costs.export)
    record = search.record(
        candidate,
        exported,
        rung=rung,
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
    return f"{point.description}, {point.steps} steps: {point.validation:.2f} % ({drop:+.2f}), {times}"
