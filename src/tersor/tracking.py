"""Sends the values of a run to TensorBoard or MLflow, through the trackers of accelerate."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tersor.core.errors import InputError
from tersor.core.progress import ProgressReporter

TrackerName = Literal["tensorboard", "mlflow"]


class TrackedProgress:
    """A `ProgressReporter` that also logs every new value, with the number of the step within its task.

    Args:
        progress: receives everything as well.
        name: the tracker.
        folder: for the files of TensorBoard; its name is the name of the run.
    """

    def __init__(self, progress: ProgressReporter, name: TrackerName, folder: Path) -> None:
        self._progress, self._name, self._folder = progress, name, folder
        self._tracker: Any = None
        self._task, self._step = "", 0
        self._logged: dict[str, float] = {}

    def start(self, task: str, total: int) -> None:
        """Start a task; its steps are counted from 0."""
        self._task, self._step, self._logged = task.replace(":", ""), 0, {}
        self._progress.start(task, total)

    def advance(self, items: int = 1, **values: float) -> None:
        """Log the values if a loss or an accuracy is new; the learning rate changes in every step."""
        self._step += items
        self._progress.advance(items, **values)
        told = {name: value for name, value in values.items() if name != "learning_rate"}
        if told and told != self._logged:
            self._logged = told
            self._started().log({f"{self._task}/{name}": value for name, value in values.items()}, step=self._step)

    def say(self, line: str) -> None:
        """Print a line; trackers do not receive it."""
        self._progress.say(line)

    def finish(self) -> None:
        """Write everything."""
        if self._tracker is not None:
            self._tracker.finish()

    def _started(self) -> Any:
        # not earlier: a tracker joins the processes of accelerate, which the training loop sets up
        if self._tracker is None:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            tracker: Any = LOGGER_TYPE_TO_CLASS[self._name]
            where = {"logging_dir": str(self._folder)} if self._name == "tensorboard" else {}
            self._tracker = tracker(self._folder.stem, **where)
            self._tracker.start()
        return self._tracker


@contextmanager
def tracked(progress: ProgressReporter, name: TrackerName | None, folder: Path) -> Generator[ProgressReporter]:
    """Yield a reporter that also logs to a tracker, or `progress` itself without a name.

    Raises:
        InputError: the tracker is not installed.
    """
    if name is None:
        yield progress
        return
    if find_spec(name) is None:
        raise InputError(f"--track {name} needs the package {name}. Run: pip install {name}.")
    reporter = TrackedProgress(progress, name, folder)
    try:
        yield reporter
    finally:
        reporter.finish()
