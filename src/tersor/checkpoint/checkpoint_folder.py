"""One checkpoint: a folder that is read only where every bit of it is as it was written, and what is in it is as a run
writes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.files import LARGEST, read_json
from tersor.training.snapshot import with_prefix

CLOCK, STRUCTURE, TENSORS = "clock.json", "structure.json", "tensors.safetensors"
NOTES = "notes"
HASH = 8
_ANEW = "Remove the folder that it lies in, and begin anew."


class _Clock(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    unit: Annotated[int, Field(ge=0, lt=2**31)]
    step: Annotated[int, Field(ge=0, lt=2**62)]
    done: bool
    told: dict[str, Any]
    sha256: Annotated[dict[Literal["structure.json", "tensors.safetensors"], str], Field(min_length=2)]


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole.

    Attributes:
        path: its folder.
        unit: what is being trained: the teacher or a stage, by its place in the run.
        step: optimizer steps that it has done.
        done: whether it has ended.
        told: what the run told of the unit, as plain values.
    """

    path: Path
    unit: int
    step: int
    done: bool
    told: dict[str, Any]

    def structure(self) -> Any:
        """What methods laid on the network."""
        return read_json(self.path / STRUCTURE, _ANEW)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the work before the first step has found, a line each."""
        notes = self.told.get(NOTES, ())
        return tuple(map(str, notes)) if isinstance(notes, list) else ()

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The records of all stages up to this one.

        Raises:
            ValueError: it is of another shape.
        """
        return TypeAdapter(list[dict[str, Any]]).validate_python(self.told.get("stages"), strict=True)

    def tensors(self) -> dict[str, Tensor]:
        """Values by name: of the network `model.`, and of what else a stage's end keeps `kept.`.

        Raises:
            InputError: the file is no safetensors file.
        """
        try:
            return load_file(self.path / TENSORS)
        except (SafetensorError, KeyError, OSError) as error:  # KeyError: a data type that torch does not have
            raise InputError(f"{self.path / TENSORS} is damaged: {error}. {_ANEW}") from error

    def network(self) -> dict[str, Tensor]:
        """The network's `state_dict`."""
        return with_prefix(self.tensors(), "model")


def read(path: Path) -> Checkpoint | None:
    """The checkpoint, if every bit of it is as it was written."""
    try:
        if (path / CLOCK).stat().st_size > LARGEST or not digest(path / CLOCK).startswith(path.name[-HASH:]):
            return None
        clock = _Clock.model_validate_json((path / CLOCK).read_bytes())
        if any(digest(path / file) != wanted for file, wanted in clock.sha256.items()):
            return None
    except (OSError, ValueError):
        return None
    return Checkpoint(path, clock.unit, clock.step, clock.done, clock.told)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
