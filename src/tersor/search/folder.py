"""The folder of a search: state, points, `model.onnx` and `front.json`. It can be read at any time."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from tersor.core.errors import InputError
from tersor.core.files import read_json, replacing, write_file
from tersor.evaluation.results import Machine
from tersor.search.front import BaselineSpeedup, Point
from tersor.search.state import VERSION, State, read_state

MODEL, FRONT, RECIPE, STATE, DATABASE, LATENCIES, TESTED = (
    *("model.onnx", "front.json", "recipe.yaml", "search.json", "study.db", "latencies.json", "tested.json"),
)
POINTS, TRIALS, BASELINES = "points", "trials", "baselines"
UNCHANGED = f"{BASELINES}/original.onnx"
"""The file of the original, which no recipe makes."""
_RIGHT = f"{BASELINES}/original-right.npy"
_UNTRAINED = f"{TRIALS}/untrained"
_LOCK = "lock"
_REPEAT = "Repeat the search in another folder, or continue it with more time (`--time`)."


class Front(BaseModel):
    """The content of `front.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    version: int = VERSION
    """Version of the folder's format."""
    metric: str
    """Name of the metric, which is in percent."""
    budget: str
    """The budget in words."""
    limits: dict[str, Any]
    """The budget as numbers: `max_drop` in points, `latency_ms` by batch size, `megabytes`."""
    runtime: str
    """The target runtime."""
    mean: tuple[float, ...] | None
    """Mean of each channel, from 0 to 1. Subtract it from the pixels divided by 255."""
    std: tuple[float, ...] | None
    """Standard deviation of each channel, from 0 to 1. Divide by it after subtracting the mean."""
    minutes: float
    """Time limit, in minutes."""
    minutes_used: float
    """Time used, in minutes."""
    machine: Machine
    """The machine that everything was measured on."""
    validation_images: int
    """Number of validation images."""
    validation_error: float
    """One standard error of the original's metric on the validation images, in points."""
    test_images: int
    """Number of test images."""
    tests_chose: bool = False
    """Whether half of the test images were used for validation, because the original was trained on the held-out
    images."""
    original: str
    """Name of the baseline that drops are computed from."""
    baselines: list[Point]
    """The free baselines, in all runtimes."""
    best: str
    """Name of the point in `model.onnx`."""
    met: bool
    """Whether the best point meets the budget on the validation images."""
    shortfall: str
    """The limits that the best point exceeds, in words; empty if it meets the budget."""
    advice: list[str]
    """What to expect from more time, a larger drop or another runtime."""
    speedup: dict[int, BaselineSpeedup] = {}
    """Speedup of the best point over the fastest free baseline, by batch size; empty before the end, and for a free
    baseline."""
    points: list[Point]
    """The Pareto front, from the fastest to the slowest."""
    dominated: list[Point]
    """All other measured points."""
    failed: dict[str, str]
    """Candidates that could not be built, trained or exported, each with the reason."""
    dropped: dict[str, str] = {}
    """Why each candidate has no point on the front, by its name; empty before the end."""
    test_runs: list[list[str]] = []
    """Names of the points that were run on the test images, one list for each time the search ended."""

    def point(self, name: str) -> Point:
        """The point with this name."""
        return next(each for each in (*self.points, *self.dominated, *self.baselines) if each.name == name)


def _changes(begun: Mapping[str, str], arguments: Mapping[str, str]) -> list[str]:
    """The arguments that differ from those of the search that has begun, in words."""
    names = [name for name in {**begun, **arguments} if _shown(begun.get(name)) != _shown(arguments.get(name))]
    return [f"with {name} {_shown(begun.get(name))}, but {_shown(arguments.get(name))} is given" for name in names]


class SearchFolder:
    """Reads and writes the folder.

    Attributes:
        changed: how the arguments differ from those of an earlier search in this folder, if that search measured
            nothing.

    Args:
        path: the folder; it is created if necessary.
        arguments: the arguments of the search.

    Raises:
        InputError: the folder holds something else, or a search with other arguments that has measured something.
    """

    def __init__(self, path: Path, arguments: Mapping[str, str]) -> None:
        self.path = path
        self._created = [each for each in (path, *path.parents) if not each.exists()]
        self._begins_again, self.changed = False, list[str]()
        if path.exists() and (not path.is_dir() or (_holds_files(path) and not (path / STATE).is_file())):
            raise InputError(f"{path} already exists and will not be overwritten. Choose another folder, or remove it.")
        self.state = State(arguments=dict(arguments), study=f"{path.absolute().name}-{uuid.uuid4().hex[:8]}")
        if (path / STATE).is_file():
            begun = read_state(path / STATE)
            self._begins_again = not begun.baselines and begun.arguments != self.state.arguments
            self.changed = _changes(begun.arguments, arguments)
            if not self._begins_again:
                self._check()
                self.state = begun

    def _check(self) -> None:
        if self.changed:
            raise InputError(
                f"{self.path} belongs to a search {'; '.join(self.changed)}. Use the same arguments to resume it, or "
                "choose another folder with out=... (`--out`)."
            )

    @contextmanager
    def held(self) -> Generator[None]:
        """Hold the lock of the folder. A start that fails before there is a `model.onnx` leaves nothing behind.

        Raises:
            InputError: another process holds it, or the folder cannot be written.
        """
        try:
            (self.path / TRIALS).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / TRIALS / _LOCK)
            lock.acquire(timeout=0)
            if self._begins_again:
                self._clear()
            for folder in (POINTS, BASELINES):
                (self.path / folder).mkdir(exist_ok=True)
        except Timeout:
            raise InputError(
                f"another search is running in {self.path}. Wait until it ends, or choose another folder with "
                "out=... (`--out`)."
            ) from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}.") from error
        try:
            self.save()
            yield
        except BaseException:
            if not (self.path / MODEL).is_file():
                self._clear()
                lock.release()
                shutil.rmtree(self.path / TRIALS, ignore_errors=True)
                for folder in self._created:
                    if any(folder.iterdir()):
                        break
                    folder.rmdir()
            raise
        finally:
            lock.release()

    def _clear(self) -> None:
        """Remove what a search writes before it has measured anything."""
        self.remove_trials()
        for folder in (POINTS, BASELINES):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for name in (MODEL, STATE, DATABASE, LATENCIES):
            (self.path / name).unlink(missing_ok=True)

    def save(self) -> None:
        """Write the state."""
        write_file(self.path / STATE, self.state.model_dump_json(indent=1).encode())

    def point_file(self, name: str) -> Path:
        """The path of a point's ONNX file; its folder is created."""
        folder = self.path / POINTS / name
        folder.mkdir(exist_ok=True)
        return folder / MODEL

    def untrained_file(self) -> Path:
        """The path of the ONNX file of an untrained student, which is measured and then replaced by the next one."""
        (self.path / _UNTRAINED).mkdir(exist_ok=True)
        return self.path / _UNTRAINED / MODEL

    @property
    def original_right(self) -> NDArray[np.bool_] | None:
        """Whether the original classifies each validation image correctly (N,); None where that is unknown."""
        try:
            return np.load(self.path / _RIGHT, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None

    def keep_original_right(self, right: NDArray[np.bool_]) -> None:
        """Write `original_right`."""
        with replacing(self.path / _RIGHT) as partial, partial.open("wb") as opened:
            np.save(opened, right, allow_pickle=False)

    def relative(self, file: Path) -> str:
        """A path in the folder."""
        return file.relative_to(self.path).as_posix()

    def write_point(self, point: Point, recipe: str) -> None:
        """Write the recipe and the numbers beside a point's file."""
        write_file((self.path / point.file).parent / RECIPE, recipe.encode())
        self.write_numbers(point)

    def write_numbers(self, point: Point) -> None:
        """Write the numbers beside a point's file."""
        write_file((self.path / point.file).parent / "numbers.json", point.model_dump_json(indent=1).encode())

    def provide(self, file: Path) -> None:
        """Copy a file to `model.onnx` if there is none yet."""
        if not (self.path / MODEL).is_file():
            with replacing(self.path / MODEL) as partial:
                shutil.copyfile(file, partial)

    def hand_over(self, point: Point) -> None:
        """Copy the file of a point to `model.onnx`, and its recipe; each is replaced atomically.

        The unchanged original has no recipe, so there is none in the folder then.
        """
        file = self.path / point.file
        copies = {MODEL: file} if point.file == UNCHANGED else {MODEL: file, RECIPE: file.parent / RECIPE}
        for name, source in copies.items():
            if source.is_file():
                with replacing(self.path / name) as partial:
                    shutil.copyfile(source, partial)
        if RECIPE not in copies:
            (self.path / RECIPE).unlink(missing_ok=True)

    def write_front(self, front: Front) -> None:
        """Write `front.json`."""
        write_file(self.path / FRONT, front.model_dump_json(indent=1).encode())

    def remove_trials(self, kept: Sequence[str] = ()) -> None:
        """Delete the checkpoints of all candidates but the `kept` ones."""
        for folder in (self.path / TRIALS).iterdir():
            if folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def read_front(path: Path) -> Front:
    """Read `front.json` of a folder.

    Raises:
        InputError: it is not the folder of a search.
    """
    file = path / FRONT
    if not file.is_file() and (path / STATE).is_file():
        raise InputError(f"the search in {path} was stopped before it had measured anything. Start it again.")
    if not file.is_file():
        raise InputError(f"{path} has no {FRONT}. Give the folder that `tersor compress` wrote.")
    try:
        return Front.model_validate(read_json(file, _REPEAT))
    except ValidationError as error:
        raise InputError(f"{file} was not written by this version of tersor. {_REPEAT}") from error


def _shown(value: str | None) -> str:
    """An argument of a search in a message."""
    return "none" if value in (None, "", "None") else repr(value)


def _holds_files(path: Path) -> bool:
    """Whether a folder has files besides the lock of a search that was killed at its start."""
    return any(not each.is_dir() and each != path / TRIALS / _LOCK for each in path.rglob("*"))
