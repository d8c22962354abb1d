"""Trials in several processes: each Ray worker, on this machine or on another, trains one candidate at a time.

A worker gets the checkpoints of a candidate, trains it, and returns its checkpoints. The search goes on from them as it
does after an interruption, so that all files are written and all latencies measured in one place. The candidate of a
worker that dies is trained once more.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tersor.core.errors import InputError, counted
from tersor.core.progress import NO_PROGRESS
from tersor.search.candidate import Candidate
from tersor.search.request import Request, experiment_of
from tersor.search.trial import Training, train
from tersor.search.workbench import Workbench

_SECONDS = 0.5
"""Time between two looks at the workers, while the bar moves."""
_START_SECONDS = 300.0
"""Longest time for starting the workers, which read the images."""
_REMOVAL_SECONDS = 20.0
"""Longest time for removing the temporary folders on all machines of a cluster."""
Files = dict[str, bytes]


@dataclass(frozen=True)
class Placement:
    """Where the trials of a search are trained.

    Attributes:
        workers: number of processes.
        address: address of a Ray cluster; a cluster of this machine's cores by default.
    """

    workers: int
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}. Write a number of processes, 1 or more.")


class LostWorkerError(InputError):
    """The processes that trained a candidate died; on other machines, or with more memory, its training may succeed."""


@dataclass(frozen=True)
class Outcome:
    """What a worker returns: the checkpoints of its candidate, or why it was not trained."""

    files: Files
    error: str = ""


class Worker:
    """A worker process: holds the original and the data, and trains candidates.

    Args:
        request: the arguments of the search.
        students: networks that replace the original, with their weights files.
        folder: the working directory of the search, which paths are relative to.
        threads: number of PyTorch threads.
        tests_choose: whether half of the test images are used for validation.
        scratch: a temporary folder of its own. The process that starts the worker removes it, because Ray may kill the
            worker at any moment.
    """

    def __init__(
        self,
        request: Request,
        students: Mapping[str, Path | None],
        folder: str,
        threads: int,
        *,
        tests_choose: bool,
        scratch: Path,
    ) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        torch.set_num_threads(threads)
        experiment = experiment_of(request, NO_PROGRESS)
        _remove(scratch)  # of a worker that died
        scratch.mkdir(parents=True)
        bench = Workbench(experiment, students, scratch, NO_PROGRESS)
        self._bench = bench.choosing_on_test_images() if tests_choose else bench

    def ready(self) -> None:
        """Do nothing; Ray calls it after the start."""

    def train(self, candidate: Candidate, training: Training, files: Files) -> Outcome:
        """Train a candidate from its checkpoints."""
        folder = self._bench.folder / candidate.name
        write_folder(folder, files)
        try:
            train(self._bench, candidate, training)
            return Outcome(read_folder(folder))
        except InputError as error:
            return Outcome({}, str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Workers:
    """The workers of one search.

    Attributes:
        count: number of processes.
    """

    def __init__(self, ray: ModuleType, actors: Sequence[Any], folder: Path) -> None:
        self._ray, self._actors, self._folder = ray, list(actors), folder
        self.count = len(self._actors)

    def train(self, trainings: Mapping[Candidate, Training]) -> Generator[tuple[Candidate, InputError | None] | None]:
        """Train candidates; their checkpoints are written to the folder of the search.

        Yields:
            Each trained candidate with the reason if it failed, and None every half second.
        """
        waiting, free, busy = list(trainings), list(self._actors), dict[Any, tuple[Candidate, Any]]()
        ended: list[tuple[Candidate, Any]] = []
        while waiting or busy or ended:
            while waiting and free:
                candidate, actor = waiting.pop(0), free.pop()
                sent = read_folder(self._folder / candidate.name)
                busy[actor.train.remote(candidate, trainings[candidate], sent)] = candidate, actor
            for candidate, reference in ended:  # its caller exports and measures while the workers train the next ones
                yield candidate, self._received(candidate, reference)
            yield None
            done = self._ray.wait(list(busy), timeout=_SECONDS)[0] if busy else []
            ended = [(busy[each][0], each) for each in done]
            free += [busy.pop(each)[1] for each in done]

    def _received(self, candidate: Candidate, reference: Any) -> InputError | None:
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:  # an error in the code of a worker
            raise
        except self._ray.exceptions.RayError as error:
            return LostWorkerError(f"the worker process died twice while training this candidate: {_last_line(error)}")
        if outcome.error:
            return InputError(outcome.error)
        write_folder(self._folder / candidate.name, outcome.files)
        return None


@contextmanager
def started(placement: Placement, request: Request, bench: Workbench) -> Generator[Workers]:
    """Start the workers, and end them afterwards.

    Raises:
        InputError: Ray is not installed or is in use, there is no cluster at the address, it has fewer cores than
            workers, or a worker cannot start.
    """
    ray = _ray()
    if ray.is_initialized():
        raise InputError("Ray is in use in this process. Call ray.shutdown() first.")
    try:
        ray.init(
            address=placement.address or "local",
            num_cpus=None if placement.address else placement.workers,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, ValueError) as error:
        raise _not_started(placement, error) from error
    scratch, actors = Path(tempfile.mkdtemp(prefix="tersor-")), list[Any]()
    try:
        threads = _threads(ray, placement)
        reserved = threads if placement.address else 1
        remote = ray.remote(num_cpus=reserved, max_restarts=-1, max_task_retries=1)(Worker)
        given = request, dict(bench.students), str(Path.cwd()), threads
        arguments = [ray.put(each) for each in given]  # held until the end: a worker that is replaced needs them again
        actors = [
            remote.remote(*arguments, tests_choose=bench.tests_choose, scratch=scratch / str(number))
            for number in range(placement.workers)
        ]
        yield Workers(ray, _ready(ray, actors), bench.folder)
    finally:
        for actor in actors:
            ray.kill(actor)
        if placement.address:
            _remove_everywhere(ray, scratch)
        ray.shutdown()
        _remove(scratch)


def _not_started(placement: Placement, error: Exception) -> InputError:
    if placement.address:
        return InputError(
            f"there is no Ray cluster at {placement.address}: {error}. Start one with `ray start --head`, or leave "
            "ray_address (`--ray-address`) out."
        )
    return InputError(f"Ray cannot be started on this machine: {error}. Leave workers (`--workers`) out.")


def _threads(ray: ModuleType, placement: Placement) -> int:
    """Threads of a worker: the most with which all workers fit on the machines."""
    if not placement.address:
        return max(1, (os.cpu_count() or 1) // placement.workers)
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    for threads in range(max(cores, default=0), 0, -1):
        if sum(each // threads for each in cores) >= placement.workers:
            return threads
    raise InputError(
        f"workers is {placement.workers}, but the cluster at {placement.address} has {counted(sum(cores), 'core')}. "
        "Use fewer workers."
    )


def _ready(ray: ModuleType, actors: Sequence[Any]) -> list[Any]:
    """The workers that have started. The others wait for cores that other programs use."""
    calls = [actor.ready.options(max_task_retries=0).remote() for actor in actors]
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=_START_SECONDS)
    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        raise InputError(
            f"a worker cannot start: {_last_line(error).rstrip('.')}. Paths in the arguments must exist on all "
            "machines."
        ) from error
    if not done:
        raise InputError(
            f"no worker has started after {_START_SECONDS:.0f} s. Possible reasons: other programs use the cores, or "
            "loading the networks and the images takes longer. Use fewer workers, or start the search again later."
        )
    return [actor for actor, call in zip(actors, calls, strict=True) if call in done]


def _last_line(error: Exception) -> str:
    """The last line of an error of Ray, which ends with that of the worker, without its class."""
    return re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1])


def _remove_everywhere(ray: ModuleType, folder: Path) -> None:
    """Remove a folder on all machines of a cluster."""
    on_node = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    remove = ray.remote(num_cpus=0)(_remove)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    tasks = [remove.options(scheduling_strategy=on_node(node, soft=False)).remote(folder) for node in nodes]
    ray.wait(tasks, num_returns=len(tasks), timeout=_REMOVAL_SECONDS)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError("workers need Ray, which is not installed: pip install ray") from error


def read_folder(folder: Path) -> Files:
    """The files of a candidate's checkpoints by their path in the folder; empty if there is none."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def write_folder(folder: Path, files: Files) -> None:
    """Add these files to a folder. The names of checkpoints have a hash, so that they replace no other one."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
