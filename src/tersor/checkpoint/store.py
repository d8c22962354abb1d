"""Checkpoints of a run: each a folder, written whole or not at all, and found by the hash in its name.

    OUT.checkpoints/
      recipe.yaml                        what is being run
      lock                               held while a process runs; the system frees it when that dies
      01-distil-0000200-1a2b3c4d/        stage, step, and the first digits of the SHA-256 of clock.json
      01-distil-end-5e6f7a8b/            at the end of a stage
        clock.json                       where in the run it is, and the SHA-256 of the other two
        structure.json                   what methods laid on the network
        tensors.safetensors              weights, buffers, the optimizer's state, random numbers

Nothing is pickled. A checkpoint is skipped if its bits have changed or if it holds something that no run writes. The
checkpoint before it is used instead.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.checkpoint.checkpoint_folder import CLOCK, HASH, NOTES, STRUCTURE, TENSORS, Checkpoint, digest, read
from tersor.core import distributed
from tersor.core.errors import InputError

_RECIPE, _LOCK, _PARTIAL = "recipe.yaml", "lock", "partial"
_END = "end"
_ANY_HASH = "?" * HASH
_UNFINISHED = f"*-{'[0-9]' * 7}-{_ANY_HASH}"
_ENDED = f"*-{_END}-{_ANY_HASH}"
_UNFINISHED_KEPT = 2
_BEFORE = "before_the_first_step"


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        last: the newest whole one that this process wrote or went on from.
        damaged: checkpoints that were skipped.
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
        if distributed.rank():  # of those that train together the first holds it
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
            clock["sha256"] = {file: digest(scratch / file) for file in (STRUCTURE, TENSORS)}
            (scratch / CLOCK).write_text(json.dumps(clock))
            place = _END if done else f"{step:07d}"
            path = self.folder / f"{unit:02d}-{name}-{place}-{digest(scratch / CLOCK)[:HASH]}"
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
        found = [read(path) for path in self._folders(_ENDED)]
        return [each for each in found if each is not None]

    def _newest(self, names: str) -> Checkpoint | None:
        for path in reversed(self._folders(names)):
            checkpoint = read(path)
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


class StageCheckpointer:
    """Keeps the training of one unit of a run, and knows where it left off.

    Attributes:
        every: steps between two snapshots.
        resume_state: steps that were done before, and the snapshot after them; None where there was none.
        setup_state: the network's `state_dict`, where the work before the first step was left.
        notes: what that work found, a line each; kept with every snapshot.
    """

    def __init__(self, checkpoints: Checkpoints, unit: int, name: str, every: int, laid: dict[str, Any]) -> None:
        self.every = every
        self._checkpoints = checkpoints
        self._keep = partial(checkpoints.save, unit, name, done=False, structure=laid)
        found = checkpoints.newest_within(unit)
        self.resume_state: tuple[int, Mapping[str, Tensor]] | None = None
        self.setup_state: Mapping[str, Tensor] | None = None
        self.notes: tuple[str, ...] = ()
        if found is not None and found.told.get(_BEFORE):
            self.setup_state = found.network()
        elif found is not None:
            self.resume_state = found.step, found.tensors()
            self.notes = found.notes

    @property
    def last(self) -> str | None:
        """The newest checkpoint of the run."""
        return self._checkpoints.last

    def keep_setup(self, network: nn.Module) -> None:
        """Takes the network as far as the work before the first step has come."""
        if not distributed.rank():
            tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
            self._keep(step=0, tensors=tensors, told={_BEFORE: True})

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes the snapshot after `step` steps; of processes that train together the first writes it."""
        if not distributed.rank():
            self._keep(step=step, tensors=tensors, told={NOTES: self.notes})


def _to_disk(path: Path) -> None:
    """Or a power cut leaves the rename without the contents."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
