"""Read one checkpoint folder, verified by hashes and a strict schema."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.files import LARGEST, read_json, sha256
from tersor.training.snapshot import with_prefix

CLOCK, STRUCTURE, TENSORS = "clock.json", "structure.json", "tensors.safetensors"
NOTES = "notes"
HASH = 8
_ANEW = "Remove the folder that contains this checkpoint, and start again."


class _Clock(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    unit: Annotated[int, Field(ge=0, lt=2**31)]
    step: Annotated[int, Field(ge=0, lt=2**62)]
    done: bool
    record: dict[str, Any]
    sha256: Annotated[dict[Literal["structure.json", "tensors.safetensors"], str], Field(min_length=2)]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        unit: 0 is the teacher; the stages are 1, 2, ...
        step: completed optimizer steps.
        done: whether the unit is finished.
        record: the records of the run up to here, as JSON values.
    """

    path: Path
    unit: int
    step: int
    done: bool
    record: dict[str, Any]

    def structure(self) -> Any:
        """Parametrizations, quantizers and removed channels, as JSON values."""
        return read_json(self.path / STRUCTURE, _ANEW)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the attachment."""
        notes = self.record.get(NOTES, ())
        return tuple(map(str, notes)) if isinstance(notes, list) else ()

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The records of all stages up to this one.

        Raises:
            ValueError: they are not a list of mappings.
        """
        return TypeAdapter(list[dict[str, Any]]).validate_python(self.record.get("stages"), strict=True)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `model.` is the network, `kept.` is the extra state of a finished stage.

        Raises:
            InputError: not a safetensors file.
        """
        try:
            return load_file(self.path / TENSORS)
        except (SafetensorError, KeyError, OSError) as error:  # KeyError: an unknown data type
            raise InputError(f"{self.path / TENSORS} is damaged: {error}. {_ANEW}") from error

    def network(self) -> dict[str, Tensor]:
        """The network's `state_dict`."""
        return with_prefix(self.tensors(), "model")


def read(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None if it is damaged or malformed."""
    try:
        if (path / CLOCK).stat().st_size > LARGEST or not sha256(path / CLOCK).startswith(path.name[-HASH:]):
            return None
        clock = _Clock.model_validate_json((path / CLOCK).read_bytes())
        if any(sha256(path / file) != expected for file, expected in clock.sha256.items()):
            return None
    except (OSError, ValueError):
        return None
    return Checkpoint(path, clock.unit, clock.step, clock.done, clock.record)
