"""`search.json`: what a resumed search needs besides its trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tersor.core.errors import InputError
from tersor.core.files import read_json
from tersor.search.front import Point
from tersor.search.plan import Costs

VERSION = 1


class Rung(BaseModel):
    """A rung of the halving.

    Attributes:
        members: its candidates by name, with the number of their training run, from 1.
        until: the rung ends when the search has used this many seconds; None for the last one, which gets the rest.
        planned: the stages of each training run that has begun and not ended, as plain data.
        unsurveyed: parameters of its candidates that were not surveyed, by name.
    """

    model_config = ConfigDict(extra="forbid")
    members: dict[str, int]
    until: float | None = None
    planned: dict[str, list[dict[str, Any]]] = {}
    unsurveyed: dict[str, dict[str, Any]] = {}


class State(BaseModel):
    """What a resumed search needs besides its trials.

    Attributes:
        arguments: the arguments of the search; a resumed search must have the same ones.
        study: name of the search in its database, which other searches may share.
        used: seconds used so far.
        seen: whether the original was trained on the validation images; half of the test images are then used for
        validation.
        survey_until: the survey ends when the search has used this many seconds.
        rungs: the rungs of the halving so far.
        costs: seconds that each kind of work takes.
        baselines: the measured free baselines.
        finished: whether the search ended by itself.
        minutes: time limit of the finished search; only a larger limit continues it.
        test_runs: names of the points that were run on the test images, one list for each time the search ended.
        extended: whether a finished search was given more time, in which its last candidate is trained further.
    """

    model_config = ConfigDict(extra="forbid")
    version: int = VERSION
    arguments: dict[str, str]
    study: str
    used: float = 0.0
    seen: bool | None = None
    survey_until: float | None = None
    rungs: list[Rung] = []
    costs: Costs = Costs()
    baselines: list[Point] = []
    finished: bool = False
    minutes: float = 0.0
    test_runs: list[list[str]] = []
    extended: bool = False


def read_state(file: Path) -> State:
    """Read `search.json`.

    Raises:
        InputError: it is damaged, or was written by another version.
    """
    advice = "Choose another folder with out=... (`--out`)."
    try:
        return State.model_validate(read_json(file, advice))
    except ValidationError as error:
        raise InputError(f"{file} was not written by this version of tersor. {advice}") from error
