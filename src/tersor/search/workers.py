"""Trials in several processes: each Ray worker, on this machine or on another, trains one candidate at a time.

A worker gets the checkpoints of a candidate, trains it, and returns its checkpoints. The search goes on from them as it
does after an interruption, so that files and latencies of all candidates are made in one place. The candidate of a
worker that dies is trained once more.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS
from tersor.search.candidate import Candidate
from tersor.search.request import Request, experiment_of
from tersor.search.trial import Training, train
from tersor.search.workbench import Workbench

_SECONDS = 0.5
"""Time between two looks at the workers, while the bar moves."""
_REMOVAL_SECONDS = 20.0
"""Longest time for removing the temporary folders on all machines of a cluster."""
Files = dict[str, bytes]


@dataclass(frozen=True)
class Placement:
    """Where the trials of a search are trained.

    Attributes:
        workers: number of processes.
        address: of a Ray cluster; a cluster of this machine's cores by default.
    """

    workers: int
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}. Write a number of processes, 1 or more.")


@dataclass(frozen=True)
class Outcome:
    """What a worker returns: the checkpoints of its candidate, or why it was not trained."""

    files: Files
    error: str = ""


class Worker:
    """In the process of a worker: the original, the data, and the candidates that it trains.

    Args:
        request: the arguments of the search.
        students: networks that replace the original, with their weights files.
        folder: the working directory of the search, which paths are relative to.
        threads: threads of torch.
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

    def train(self, trainings: Mapping[Candidate, Training]) -> Generator[tuple[Candidate, str] | None]:
        """Train candidates; their checkpoints are written to the folder of the search.

        Yields:
            Each trained candidate with "" or the reason of its failure, and None every half second.
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

    def _received(self, candidate: Candidate, reference: Any) -> str:
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            return f"the worker that trained it died, and the one that tried again too: {str(error).splitlines()[-1]}"
        if not outcome.error:
            write_folder(self._folder / candidate.name, outcome.files)
        return outcome.error


@contextmanager
def started(placement: Placement, request: Request, bench: Workbench) -> Generator[Workers]:
    """Start the workers, and end them afterwards.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    ray = _ray()
    try:
        ray.init(
            address=placement.address,
            num_cpus=None if placement.address else placement.workers,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, ValueError) as error:
        raise InputError(
            f"there is no Ray cluster at {placement.address}: {error}. Start one with `ray start --head`, or leave "
            "ray_address (`--ray-address`) out."
        ) from error
    scratch, actors = Path(tempfile.mkdtemp(prefix="tersor-")), list[Any]()
    try:
        cores = int(ray.cluster_resources()["CPU"]) if placement.address else os.cpu_count() or 1
        threads = max(1, cores // placement.workers)
        reserved = threads if placement.address else 1
        remote = ray.remote(num_cpus=reserved, max_restarts=-1, max_task_retries=1)(Worker)
        arguments = request, dict(bench.students), str(Path.cwd()), threads
        actors = [
            remote.remote(*arguments, tests_choose=bench.tests_choose, scratch=scratch / str(number))
            for number in range(placement.workers)
        ]
        yield Workers(ray, actors, bench.folder)
    finally:
        for actor in actors:
            ray.kill(actor)
        if placement.address:
            _remove_everywhere(ray, scratch)
        ray.shutdown()
        _remove(scratch)


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
