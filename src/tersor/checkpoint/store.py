"""Checkpoints of a run: folders that are written atomically and verified by the hash in their names.

    OUT.checkpoints/
      recipe.yaml                        the recipe of the run
      lock                               held while a process runs; the operating system releases it
      01-distill-0000200-1a2b3c4d/        stage, step, and the first digits of the SHA-256 of clock.json
      01-distill-end-5e6f7a8b/            at the end of a stage
        clock.json                       position in the run, and the SHA-256 of the other two files
        structure.json                   parametrizations, quantizers and removed channels
        tensors.safetensors              weights, buffers, optimizer state, random state

Nothing is pickled. A checkpoint that is damaged or malformed is skipped, and the one before it is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.checkpoint.checkpoint_folder import CLOCK, HASH, NOTES, STRUCTURE, TENSORS, Checkpoint, read
from tersor.core import distributed
from tersor.core.errors import InputError
from tersor.core.files import flush_to_disk, sha256

_RECIPE, _LOCK, _PARTIAL = "recipe.yaml", "lock", "partial"
_END = "end"
_ANY_HASH = "?" * HASH
_UNFINISHED = f"*-{'[0-9]' * 7}-{_ANY_HASH}"
_ENDED = f"*-{_END}-{_ANY_HASH}"
_UNFINISHED_KEPT = 2
_SETUP = "setup"


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        last: the newest checkpoint that this process wrote or resumed from.
        damaged: checkpoints that were skipped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: str | None = None
        self.damaged: list[Path] = []

    @contextmanager
    def held(self, recipe: str, *, resume: bool, changes: Callable[[str], str] = lambda _: "") -> Generator[None]:
        """Hold the lock of the folder: only this process writes checkpoints.

        Args:
            recipe: the text of the recipe.
            resume: whether to resume from existing checkpoints.
            changes: text of the earlier recipe -> how this one differs from it, in words.

        Raises:
            InputError: another process uses the folder; checkpoints exist and `resume` is False, or they belong to
                another recipe.
        """
        if distributed.rank():  # the first process holds the lock
            yield
            return
        lock = self._locked()
        try:
            try:
                if self._folders("*"):
                    self._check(recipe, resume, changes)
                else:
                    (self.folder / _RECIPE).write_text(recipe)
            except OSError as error:
                raise self._unusable(error) from error
            yield
        finally:
            if not self._folders("*"):  # no checkpoint was written
                shutil.rmtree(self.folder, ignore_errors=True)
            lock.release()

    def _locked(self) -> BaseFileLock:
        """Create the folder if needed and acquire its lock."""
        above = [parent for parent in (self.folder, *self.folder.absolute().parents) if not parent.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / _LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process is writing to {self.folder}. Wait for it, or choose another folder with "
                "out=... (`--out`)."
            ) from None
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            for folder in above:
                with suppress(OSError):
                    (folder / _LOCK).unlink(missing_ok=True)
                    folder.rmdir()
            raise self._unusable(error) from error
        return lock

    def _unusable(self, error: Exception) -> InputError:
        return InputError(
            f"cannot use {self.folder}: {error}. Free disk space, check the permissions, or choose another folder with "
            "out=... (`--out`)."
        )

    def _check(self, recipe: str, resume: bool, changes: Callable[[str], str]) -> None:
        begun = self.folder / _RECIPE
        if not resume:
            raise InputError(
                f"{self.folder} holds an unfinished run. Add resume=True (`--resume`) to resume it, remove the "
                "folder, or choose another one with out=... (`--out`)."
            )
        before = begun.read_text(errors="replace")
        if before != recipe:
            changed = changes(before)
            raise InputError(
                f"{self.folder} holds an unfinished run of another recipe{f' ({changed})' if changed else ''}. Resume "
                f"that run with its own recipe, {begun}, or choose another folder with out=... (`--out`)."
            )

    @property
    def scratch(self) -> Path:
        """Temporary folder beside the checkpoints; emptied on resume."""
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
        record: dict[str, Any],
    ) -> Path:
        """Write a checkpoint atomically; keep the newest two of unfinished units.

        Raises:
            InputError: the disk is full or read-only; earlier checkpoints are unchanged.
        """
        scratch = self.scratch
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            save_file({key: value.contiguous().clone() for key, value in tensors.items()}, scratch / TENSORS)
            (scratch / STRUCTURE).write_text(json.dumps(structure))
            clock = {"unit": unit, "step": step, "done": done, "record": record}
            clock["sha256"] = {file: sha256(scratch / file) for file in (STRUCTURE, TENSORS)}
            (scratch / CLOCK).write_text(json.dumps(clock))
            place = _END if done else f"{step:07d}"
            path = self.folder / f"{unit:02d}-{name}-{place}-{sha256(scratch / CLOCK)[:HASH]}"
            for file in scratch.iterdir():
                flush_to_disk(file)
            shutil.rmtree(path, ignore_errors=True)
            scratch.rename(path)
            flush_to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise InputError(
                f"cannot write a checkpoint to {self.folder}: {error}. Last checkpoint: "
                f"{self.last or 'none was written'}. Free disk space. To continue, repeat the same call; for "
                "`tersor.run`, add resume=True (`--resume`)."
            ) from error
        self.last = str(path)
        replaced = [old for old in self._folders(f"{unit:02d}-{name}-{place}-{_ANY_HASH}") if old != path]
        for old in [*replaced, *self._folders(_UNFINISHED)[:-_UNFINISHED_KEPT]]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def end_of(self, unit: int) -> Checkpoint | None:
        """The checkpoint at the end of a unit."""
        return self._newest(f"{unit:02d}-{_ENDED}")

    def newest_within(self, unit: int) -> Checkpoint | None:
        """The newest checkpoint of an unfinished unit."""
        return self._newest(f"{unit:02d}-{_UNFINISHED}")

    def ends(self) -> list[Checkpoint]:
        """The checkpoints at the end of each finished unit, in order."""
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

    def remove_renamed(self, names: Sequence[str]) -> None:
        """Delete the checkpoints of stages 1, 2, ... whose names differ from those in `names`."""
        for unit, name in enumerate(names, 1):
            kept = self._folders(f"{unit:02d}-{name}-*")
            for path in self._folders(f"{unit:02d}-*"):
                if path not in kept:
                    shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Delete all checkpoints, after the artifact is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self, names: str) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in self.folder.glob(names) if path.is_dir() and path != self.scratch)


class StageCheckpointer:
    """Saves the state of one unit (the teacher or a stage), and holds the state to resume from.

    Attributes:
        every: steps between checkpoints.
        resume_state: number of completed steps, and the training state after them; None without a checkpoint.
        setup_state: the network's `state_dict` if `Attachment.begin` was interrupted.
        notes: notes of the attachment, stored with every checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints, unit: int, name: str, every: int, laid: dict[str, Any]) -> None:
        self.every = every
        self._checkpoints = checkpoints
        self._keep = partial(checkpoints.save, unit, name, done=False, structure=laid)
        found = checkpoints.newest_within(unit)
        self.resume_state: tuple[int, Mapping[str, Tensor]] | None = None
        self.setup_state: Mapping[str, Tensor] | None = None
        self.notes: tuple[str, ...] = ()
        if found is not None and found.record.get(_SETUP):
            self.setup_state = found.network()
        elif found is not None:
            self.resume_state = found.step, found.tensors()
            self.notes = found.notes

    @property
    def last(self) -> str | None:
        """The newest checkpoint of the run."""
        return self._checkpoints.last

    def keep_setup(self, network: nn.Module) -> None:
        """Save the network in the middle of `Attachment.begin`."""
        if not distributed.rank():
            tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
            self._keep(step=0, tensors=tensors, record={_SETUP: True})

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the training state after `step` steps, in the first process."""
        if not distributed.rank():
            self._keep(step=step, tensors=tensors, record={NOTES: self.notes})
