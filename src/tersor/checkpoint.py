"""Checkpoints of a run: each a folder, written whole or not at all, and found by the hash in its name.

    OUT.checkpoints/
      recipe.yaml                        what is being run
      lock                               held while a process runs; the system frees it when that dies
      01-distil-0000200-1a2b3c4d/        stage, step, and the first digits of the SHA-256 of clock.json
      01-distil-end-5e6f7a8b/            at the end of a stage
        clock.json                       where in the run it is, and the SHA-256 of the other two
        structure.json                   what methods laid on the network
        tensors.safetensors              weights, buffers, the optimizer's state, random numbers

Nothing is pickled. One whose bits have flipped is passed over, and the one before it is taken; so is one that holds
what no run writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersor.core import processes
from tersor.core.errors import InputError
from tersor.core.json_file import LARGEST, read_json
from tersor.core.snapshot import part

CLOCK, STRUCTURE, TENSORS = "clock.json", "structure.json", "tensors.safetensors"
_RECIPE, _LOCK, _PARTIAL = "recipe.yaml", "lock", "partial"
_HASH = 8
_END = "end"
_ANY_HASH = "?" * _HASH
_UNFINISHED = f"*-{'[0-9]' * 7}-{_ANY_HASH}"
_ENDED = f"*-{_END}-{_ANY_HASH}"
_UNFINISHED_KEPT = 2
_BEFORE, _NOTES = "before_the_first_step", "notes"
_ANEW = "Remove the folder that it lies in, and begin anew."


class _Clock(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    unit: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
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
        notes = self.told.get(_NOTES, ())
        return tuple(map(str, notes)) if isinstance(notes, list) else ()

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What is told of the stages up to this one.

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
        return part(self.tensors(), "model")


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        last: the newest whole one that this process wrote or went on from.
        damaged: what was passed over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: str | None = None
        self.damaged: list[Path] = []

    @contextmanager
    def held(self, recipe: str, *, resume: bool) -> Generator[None]:
        """While this process alone writes here.

        Args:
            recipe: text of what is run.
            resume: whether to go on from what is there.

        Raises:
            InputError: another process runs into this folder; something is there and `resume` is False, or it is of
                another recipe.
        """
        if processes.rank():  # of those that train together the first holds it
            yield
            return
        lock = self._locked()
        try:
            try:
                if self._folders("*"):
                    self._check(recipe, resume=resume)
                else:
                    (self.folder / _RECIPE).write_text(recipe)
            except OSError as error:
                raise InputError(f"{self.folder} cannot be used: {error}.") from error
            yield
        finally:
            if not self._folders("*"):  # nothing was reached: nothing is left
                shutil.rmtree(self.folder, ignore_errors=True)
            lock.release()

    def _locked(self) -> BaseFileLock:
        """The folder, made where it is not there, held by this process."""
        above = [parent for parent in (self.folder, *self.folder.absolute().parents) if not parent.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / _LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process is running into {self.folder}. Wait for it, or name another folder with --out."
            ) from None
        except (OSError, NotImplementedError) as error:  # the latter: a file system that has no locks
            for folder in above:
                with suppress(OSError):
                    (folder / _LOCK).unlink(missing_ok=True)
                    folder.rmdir()
            raise InputError(f"{self.folder} cannot be used: {error}.") from error
        return lock

    def _check(self, recipe: str, *, resume: bool) -> None:
        begun = self.folder / _RECIPE
        if not resume:
            raise InputError(
                f"{self.folder} holds a run that has not ended. Write --resume to go on with it, remove it, or name "
                "another folder with --out."
            )
        before = begun.read_text(errors="replace").splitlines()
        changed = [line.strip() for line in recipe.splitlines() if line not in before]
        if before != recipe.splitlines():
            raise InputError(
                f"{self.folder} was begun with another recipe{': ' + changed[0] if changed else ''}. Go on with "
                f"{begun}, or name another folder with --out."
            )

    @property
    def scratch(self) -> Path:
        """A place beside the checkpoints for what is being written; emptied when a run goes on."""
        return self.folder / _PARTIAL

    def save(
        self,
        unit: int,
        name: str,
        *,
        step: int,
        done: bool,
        tensors: Mapping[str, Tensor],
        structure: dict[str, Any],
        told: dict[str, Any],
    ) -> Path:
        """Writes a checkpoint whole; of the unfinished ones the newest two stay.

        Raises:
            InputError: the disk is full or cannot be written to; the checkpoints before are as they were.
        """
        scratch = self.scratch
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            save_file({key: value.contiguous().clone() for key, value in tensors.items()}, scratch / TENSORS)
            (scratch / STRUCTURE).write_text(json.dumps(structure))
            clock = {"unit": unit, "step": step, "done": done, "told": told}
            clock["sha256"] = {file: _digest(scratch / file) for file in (STRUCTURE, TENSORS)}
            (scratch / CLOCK).write_text(json.dumps(clock))
            place = _END if done else f"{step:07d}"
            path = self.folder / f"{unit:02d}-{name}-{place}-{_digest(scratch / CLOCK)[:_HASH]}"
            for file in scratch.iterdir():
                _to_disk(file)
            shutil.rmtree(path, ignore_errors=True)
            scratch.rename(path)
            _to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise InputError(
                f"no checkpoint could be written to {self.folder}: {error}. The last whole one is "
                f"{self.last or 'none'}. Make room, then go on with --resume."
            ) from error
        self.last = str(path)
        replaced = [old for old in self._folders(f"{unit:02d}-{name}-{place}-{_ANY_HASH}") if old != path]
        for old in [*replaced, *self._folders(_UNFINISHED)[:-_UNFINISHED_KEPT]]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def end_of(self, unit: int) -> Checkpoint | None:
        """The one at the end of a unit."""
        return self._newest(f"{unit:02d}-{_ENDED}")

    def newest_within(self, unit: int) -> Checkpoint | None:
        """The last one of a unit that has not ended."""
        return self._newest(f"{unit:02d}-{_UNFINISHED}")

    def ends(self) -> list[Checkpoint]:
        """Those at the end of every unit that has ended, in order."""
        found = [_read(path) for path in self._folders(_ENDED)]
        return [each for each in found if each is not None]

    def _newest(self, names: str) -> Checkpoint | None:
        for path in reversed(self._folders(names)):
            checkpoint = _read(path)
            if checkpoint is not None:
                self.last = str(path)
                return checkpoint
            self.damaged.append(path)
        return None

    def remove(self) -> None:
        """When all that they hold lies in the artifact."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self, names: str) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in self.folder.glob(names) if path.is_dir() and path != self.scratch)


class UnitKeeper:
    """Keeps the training of one unit of a run, and knows where it left off.

    Attributes:
        every: steps between two snapshots.
        begun: steps that were done before, and the snapshot after them; None where there was none.
        before_the_first: the network's `state_dict`, where the work before the first step was left.
        notes: what that work found, a line each; kept with every snapshot.
    """

    def __init__(self, checkpoints: Checkpoints, unit: int, name: str, every: int, laid: dict[str, Any]) -> None:
        self.every = every
        self._checkpoints = checkpoints
        self._keep = partial(checkpoints.save, unit, name, done=False, structure=laid)
        found = checkpoints.newest_within(unit)
        self.begun: tuple[int, Mapping[str, Tensor]] | None = None
        self.before_the_first: Mapping[str, Tensor] | None = None
        self.notes: tuple[str, ...] = ()
        if found is not None and found.told.get(_BEFORE):
            self.before_the_first = found.network()
        elif found is not None:
            self.begun = found.step, found.tensors()
            self.notes = found.notes

    @property
    def last(self) -> str | None:
        """The newest checkpoint of the run."""
        return self._checkpoints.last

    def keep_before_the_first(self, network: nn.Module) -> None:
        """Takes the network as far as the work before the first step has come."""
        if not processes.rank():
            tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
            self._keep(step=0, tensors=tensors, told={_BEFORE: True})

    def keep(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes the snapshot after `step` steps; of processes that train together the first writes it."""
        if not processes.rank():
            self._keep(step=step, tensors=tensors, told={_NOTES: self.notes})


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint, if every bit of it is as it was written."""
    try:
        if (path / CLOCK).stat().st_size > LARGEST or not _digest(path / CLOCK).startswith(path.name[-_HASH:]):
            return None
        clock = _Clock.model_validate_json((path / CLOCK).read_bytes())
        if any(_digest(path / file) != digest for file, digest in clock.sha256.items()):
            return None
    except (OSError, ValueError):
        return None
    return Checkpoint(path, clock.unit, clock.step, clock.done, clock.told)


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Or a power cut leaves the rename without the contents."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
