"""The trials of a search, in an Optuna database: `survey` before training, `training` for each rung of a candidate.

Both studies are multi-objective: metric (larger is better), geometric mean of the latencies in ms and megabytes. The
numbers of a trial are its user attributes. A finished trial is never run twice; one that a killed process left
unfinished is marked as failed and run again.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tersor.core.errors import InputError
from tersor.search.candidate import BITS, Candidate
from tersor.search.front import Point

SURVEY, TRAINING = "survey", "training"
_OBJECTIVES = ("metric", "latency ms", "megabytes")
_DIRECTIONS = ("maximize", "minimize", "minimize")
_RECORD, _REASON = "record", "reason"
_MOST = 2**16


class Record(BaseModel):
    """A finished trial.

    Attributes:
        candidate: parameters of the candidate.
        rung: number of its training runs so far; 0 in the survey.
        point: its measured file.
        stages: the trained stages as plain data, as in a recipe.
        rounding_loss: drop in the metric caused by quantization.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    candidate: dict[str, Any]
    rung: int
    point: Point
    stages: list[dict[str, Any]] = []
    rounding_loss: float | None = None

    @property
    def of(self) -> Candidate:
        """The candidate."""
        return Candidate.of(self.candidate)


class Study:
    """The two studies.

    Args:
        storage: an SQLAlchemy URL, or an Optuna storage.
        name: name of the search; a prefix of the study names.
        networks: names of the original and of all students.
        seed: seed of the sampler.

    Raises:
        InputError: the database cannot be opened.
    """

    def __init__(self, storage: str | BaseStorage, name: str, networks: Sequence[str], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        self._networks = CategoricalDistribution(tuple(networks))
        try:
            opened = RDBStorage(storage) if isinstance(storage, str) else storage
            self._studies = {
                each: optuna.create_study(
                    storage=opened,
                    study_name=f"{name}/{each}",
                    directions=list(_DIRECTIONS),
                    sampler=sampler,
                    load_if_exists=True,
                )
                for each in (SURVEY, TRAINING)
            }
        except (ArgumentError, SQLAlchemyError, ImportError, RuntimeError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise InputError(
                f"the database {storage} cannot be opened: {reason}. Write an SQLAlchemy URL, such as "
                "sqlite:///study.db or postgresql://user@host/name."
            ) from error
        for study in self._studies.values():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # experimental in Optuna
                study.set_metric_names(list(_OBJECTIVES))
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                study.tell(trial.number, state=TrialState.FAIL)
        self._records = {
            each: {self._key(record): record for record in map(_record, self._finished(each)) if record is not None}
            for each in self._studies
        }
        self.failed = self._failures()

    def find(self, candidate: Candidate, rung: int = 0) -> Record | None:
        """The finished trial of a candidate."""
        return self._records[TRAINING if rung else SURVEY].get((candidate.name, rung))

    def records(self) -> list[Record]:
        """All finished trials, those of the survey first."""
        return [record for of_study in self._records.values() for record in of_study.values()]

    def add(self, record: Record) -> None:
        """Store a finished trial."""
        kind = TRAINING if record.rung else SURVEY
        values = [record.point.validation, record.point.mean_ms, record.point.bytes / 1e6]
        self._add(kind, record.of, record.rung, TrialState.COMPLETE, values, {_RECORD: record.model_dump_json()})
        self._records[kind][self._key(record)] = record

    def fail(self, candidate: Candidate, rung: int, reason: str) -> None:
        """Store that a candidate cannot be built, trained or exported."""
        kind = TRAINING if rung else SURVEY
        self._add(kind, candidate, rung, TrialState.FAIL, None, {_REASON: reason[:500], "name": candidate.name})
        self.failed[candidate.name] = reason

    def suggest(self, distributions: Mapping[str, BaseDistribution]) -> tuple[Trial, dict[str, Any]]:
        """Parameters that Optuna's sampler proposes; the trial has to be closed with `tell`."""
        trial = self._studies[SURVEY].ask(dict(distributions))
        return trial, dict(trial.params)

    def tell(self, trial: Trial, record: Record | None) -> None:
        """Close a trial of `suggest`."""
        study = self._studies[SURVEY]
        if record is None:
            study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr(_RECORD, record.model_dump_json())
        study.tell(trial, [record.point.validation, record.point.mean_ms, record.point.bytes / 1e6])
        self._records[SURVEY][self._key(record)] = record

    def _add(
        self,
        kind: str,
        candidate: Candidate,
        rung: int,
        state: TrialState,
        values: Sequence[float] | None,
        attributes: Mapping[str, Any],
    ) -> None:
        chosen, distributions = self._parameters(candidate, rung)
        trial = create_trial(
            state=state, values=values, params=chosen, distributions=distributions, user_attrs=dict(attributes)
        )
        self._studies[kind].add_trial(trial)

    def _parameters(self, candidate: Candidate, rung: int) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """The parameters of a trial and their ranges; a student has no depth and no width of its own."""
        chosen: dict[str, Any] = {"network": candidate.network, "bits": candidate.bits, "pixels": candidate.pixels or 0}
        ranges: dict[str, BaseDistribution] = {
            "network": self._networks, "bits": CategoricalDistribution(BITS), "pixels": IntDistribution(0, _MOST)
        }  # fmt: skip
        if candidate.inherits:
            removals = (candidate.first, *candidate.later)
            branches, kept = sum(each.branches for each in removals), math.prod(each.keep_macs for each in removals)
            chosen |= {"branches": branches, "keep_macs": kept}
            ranges |= {"branches": IntDistribution(0, _MOST), "keep_macs": FloatDistribution(0.0, 1.0)}
        return {**chosen, "rung": rung}, {**ranges, "rung": IntDistribution(0, _MOST)}

    def _finished(self, kind: str) -> list[FrozenTrial]:
        return self._studies[kind].get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _failures(self) -> dict[str, str]:
        failed = [
            trial
            for study in self._studies.values()
            for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        ]
        return {trial.user_attrs["name"]: trial.user_attrs[_REASON] for trial in failed if _REASON in trial.user_attrs}

    @staticmethod
    def _key(record: Record) -> tuple[str, int]:
        return record.of.name, record.rung


def _record(trial: FrozenTrial) -> Record | None:
    text = trial.user_attrs.get(_RECORD)
    return None if text is None else Record.model_validate(json.loads(text))
