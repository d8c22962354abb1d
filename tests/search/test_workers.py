"""Training in several processes: the plan with simulated durations, and real Ray workers."""

import importlib
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tersor
from search_fakes import STUDENTS, FakeBench, FakeTime, searching
from tersor.core.errors import InputError
from tersor.data import Batches, load
from tersor.search import rung_training
from tersor.search.candidate import Candidate
from tersor.search.compress import compress
from tersor.search.compression_budget import Budget
from tersor.search.halving import halve
from tersor.search.plan import RUNG_SIZES
from tersor.search.space import Space
from tersor.search.state import Rung
from tersor.search.survey import survey
from tersor.search.workers import LostWorkerError, Placement, Worker, Workers, read_folder, started, write_folder
from tersor.training.attachment import Attachment
from tersor.training.loop import fit
from tersor.training.options import Training

SPACE = Space(branches=9, prunable=True, students=list(STUDENTS))
workers_module = importlib.import_module("tersor.search.workers")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


class FakeWorkers:
    """Workers that train in simulated time.

    Attributes:
        broken: names of candidates whose workers die.
    """

    def __init__(self, time, count, broken=()):
        self.time, self.count, self.broken, self.seconds = time, count, broken, []

    def train(self, trainings):
        waiting, end = list(trainings), self.time.seconds
        while waiting:
            wave, waiting = waiting[: self.count], waiting[self.count :]
            self.seconds += [trainings[each].seconds for each in wave]
            end += max(trainings[each].seconds for each in wave)
            self.time.seconds = max(self.time.seconds, end)
            yield None
            for each in wave:
                yield each, LostWorkerError("the worker died") if each.name in self.broken else None


def searched(path, count, broken=()):
    """A search of ten minutes whose candidates are trained in `count` workers."""
    time = FakeTime()
    bench = FakeBench(time)
    train = bench.train

    def from_checkpoints(candidate, trained, seconds):
        now = time.seconds
        result = train(candidate, trained, seconds)
        time.seconds = now
        return result

    bench.train = from_checkpoints
    search = searching(path, time=time, bench=bench)
    workers = FakeWorkers(time, count, broken)
    survey(search, SPACE)
    halve(search, workers)
    return search, workers


@pytest.mark.usefixtures("fake_search")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_more_workers_train_more_candidates_in_the_same_time(tmp_path, count):
    search, workers = searched(tmp_path / "out", count)
    assert 0.9 * search.clock.total <= search.clock.used <= search.clock.total
    sizes = [len(rung.members) for rung in search.folder.state.rungs]
    assert all(size <= count * most for size, most in zip(sizes, RUNG_SIZES, strict=False))
    assert sizes[0] > RUNG_SIZES[0] or count == 1
    assert sum(workers.seconds) > 0.5 * count * search.clock.total


@pytest.mark.usefixtures("fake_search", "_no_other_removal")
def test_a_dying_worker_loses_only_its_own_trial(tmp_path):
    search, _ = searched(tmp_path / "whole", 2)
    lost = next(iter(search.folder.state.rungs[0].members))
    search, _ = searched(tmp_path / "out", 2, broken=(lost,))
    assert list(search.study.failed) == [lost]
    trained = {record.of.name for record in search.study.records() if record.rung}
    assert trained == set(search.folder.state.rungs[0].members) - {lost}
    assert not search.study._failures(), "a resumed search trains it"


def test_checkpoints_are_transferred_as_bytes(tmp_path):
    (tmp_path / "a" / "01-train").mkdir(parents=True)
    (tmp_path / "a" / "01-train" / "clock.json").write_bytes(b"{}")
    (tmp_path / "a" / "recipe").write_bytes(b"text")
    (tmp_path / "a" / "lock").touch()
    files = read_folder(tmp_path / "a")
    assert files == {"01-train/clock.json": b"{}", "recipe": b"text"}
    (tmp_path / "b" / "02-train").mkdir(parents=True)
    (tmp_path / "b" / "02-train" / "clock.json").write_bytes(b"1")
    write_folder(tmp_path / "b", files)
    assert read_folder(tmp_path / "b") == {**files, "02-train/clock.json": b"1"}
    assert read_folder(tmp_path / "none") == {}


def test_invalid_placements_raise(tmp_path):
    with pytest.raises(InputError, match="workers is 0"):
        Placement(0)
    with pytest.raises(InputError, match="--workers 4"):
        compress("resnet20", "digits", ray_address="auto", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fake_search")
def test_workers_without_ray_raise(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    given = {"budget": Budget(minutes=0.01), "out": tmp_path / "out"}
    with pytest.raises(InputError, match="pip install ray"):
        compress(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), load(name="digits", limit=100), workers=2, **given)


class Digits(nn.Module):
    """A network for digits; its first training step ends the process if there is a file named `deadly`."""

    def __init__(self, deadly):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        )
        self.deadly = str(deadly)

    def forward(self, images):
        return self.layers(images)


class Loss:
    """Cross entropy that ends the process of a worker the first time."""

    def __init__(self, deadly):
        self.deadly, self.searching = str(deadly), os.getpid()

    def __call__(self, outputs, targets):
        if os.getpid() != self.searching and Path(self.deadly).exists():
            Path(self.deadly).unlink()
            os._exit(1)
        return nn.functional.cross_entropy(outputs, targets)


class FakeRay:
    """A cluster in which an actor is represented by its number.

    Attributes:
        initialized: whether the process uses Ray already.
        reserved: cores of a worker.
        pending: actors that wait for cores.
        broken: what an actor raises.
        refused: what `init` raises.
    """

    exceptions = SimpleNamespace(RayError=OSError, RayTaskError=ConnectionError)

    def __init__(self):
        self.folders, self.killed, self.removed = [], 0, []
        self.initialized, self.reserved, self.pending, self.broken, self.address = False, [], (), None, None
        self.refused = None

    def init(self, *, address, **_options):
        self.address = address
        if self.refused is not None:
            raise self.refused

    def shutdown(self):
        pass

    def is_initialized(self):
        return self.initialized

    def nodes(self):
        cores = {"a": 4.0, "b": 3.0, "c": 64.0}
        return [{"NodeID": key, "Alive": key != "c", "Resources": {"CPU": cores[key]}} for key in cores]

    def kill(self, _actor):
        self.killed += 1

    def wait(self, tasks, *, num_returns, timeout):
        assert (num_returns, timeout) in ((len(tasks), 20.0), (len(tasks), 300.0))
        return [task for task in tasks if task not in self.pending], list(self.pending)

    def put(self, value):
        return value

    def get(self, _reference):
        if self.broken is not None:
            raise self.broken

    def actor(self, scratch):
        self.folders.append(scratch)
        number = len(self.folders) - 1
        return SimpleNamespace(ready=SimpleNamespace(options=lambda **_options: SimpleNamespace(remote=lambda: number)))

    def remote(self, *, num_cpus, **_options):
        self.reserved.append(num_cpus)
        return lambda made: SimpleNamespace(
            remote=lambda *_given, scratch, **_more: self.actor(scratch),
            options=lambda scheduling_strategy: SimpleNamespace(
                remote=lambda folder: self.removed.append((made, folder, scheduling_strategy))
            ),
        )


@pytest.fixture
def ray(monkeypatch, tmp_path):
    made = FakeRay()
    monkeypatch.setattr(workers_module, "_ray", lambda: made)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    return made


@pytest.mark.parametrize("address", [None, "auto"])
def test_the_search_creates_and_removes_the_folders_of_its_workers(tmp_path, ray, address):
    """Ray ends workers without running their clean-up."""
    bench = SimpleNamespace(students={}, tests_choose=False, folder=tmp_path)

    def interrupted():
        with started(Placement(2, address), None, bench):
            (scratch,) = tmp_path.glob("tersor-*")
            assert ray.folders == [scratch / "0", scratch / "1"]
            (scratch / "0").mkdir()
            (scratch / "0" / "checkpoint").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    scratch = ray.folders[0].parent
    assert not list(tmp_path.iterdir())
    assert ray.killed == 2, "none writes while the folder is removed"
    nodes = [(folder, node) for _, folder, node in ray.removed]
    assert nodes == ([(scratch, ("a", False)), (scratch, ("b", False))] if address else []), "on all machines"
    for remove, _, _ in ray.removed:
        scratch.mkdir()
        remove(scratch)
        assert not scratch.exists()
        remove(scratch)


def workers_of(ray, count, address="auto"):
    with started(
        Placement(count, address), None, SimpleNamespace(students={}, tests_choose=False, folder=None)
    ) as made:
        return made


@pytest.mark.parametrize(("count", "threads"), [(1, 4), (2, 3), (3, 2), (4, 1), (7, 1)])
def test_each_worker_fits_on_one_machine(ray, count, threads):
    assert workers_of(ray, count).count == count
    assert ray.reserved[0] == threads
    assert ray.address == "auto"


def test_more_workers_than_cores_raise(ray):
    with pytest.raises(InputError, match=r"workers is 8, but the cluster at auto has 7 cores. Use fewer workers"):
        workers_of(ray, 8)


def test_without_an_address_a_running_cluster_is_not_used(ray):
    workers_of(ray, 2, None)
    assert ray.address == "local"
    ray.initialized = True
    with pytest.raises(InputError, match=r"Ray is in use in this process. Call ray.shutdown\(\) first"):
        workers_of(ray, 2, None)


def test_a_missing_cluster_and_a_machine_without_ray_have_different_errors(ray):
    ray.refused = ConnectionError("no reply")
    with pytest.raises(InputError, match=r"^there is no Ray cluster at auto: no reply\. .*`--ray-address`\) out\.$"):
        workers_of(ray, 2)
    with pytest.raises(InputError, match=r"^Ray cannot be started on this machine: no reply\. Leave workers \(`--work"):
        workers_of(ray, 2, None)


def test_workers_that_do_not_start_are_skipped(ray):
    ray.pending = (1,)
    assert workers_of(ray, 2).count == 1
    ray.pending, ray.folders = (0, 1), []
    with pytest.raises(InputError, match=r"after 300 s\. Possible reasons: other programs use the cores, or loading"):
        workers_of(ray, 2)
    ray.broken = OSError("The actor died\ntersor.core.errors.InputError: there is no folder cars.")
    with pytest.raises(
        InputError, match=r"a worker cannot start: there is no folder cars\. Paths in the arguments must exist"
    ):
        workers_of(ray, 2)


def test_a_lost_worker_is_not_a_failure_of_its_candidate(ray, tmp_path):
    workers, candidate = Workers(ray, [1], tmp_path), Candidate()
    ray.broken = OSError("The node\ndied.")
    lost = workers._received(candidate, None)
    assert isinstance(lost, LostWorkerError)
    assert str(lost) == "the worker process died twice while training this candidate: died."
    ray.broken = ConnectionError("an error in the code")
    with pytest.raises(ConnectionError):
        workers._received(candidate, None)


def test_a_worker_uses_the_given_folder(tmp_path, monkeypatch):
    scratch = tmp_path / "tersor-x" / "0"
    made = []
    monkeypatch.setattr(workers_module, "experiment_of", lambda *_: None)
    monkeypatch.setattr(workers_module, "Workbench", lambda *given: made.append(given[2]))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in ("first", "one that replaces it after its death"):
        Worker(None, {}, str(tmp_path / "elsewhere"), 1, tests_choose=False, scratch=scratch)
        assert list(scratch.iterdir()) == []
        (scratch / "checkpoint").touch()
    assert made == [scratch, scratch]
    assert list(tmp_path.iterdir()) == [scratch.parent]


@needs_ray
@pytest.mark.slow
def test_two_workers_of_a_local_cluster_train_and_a_dying_one_is_replaced(tmp_path, monkeypatch):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    deadly, digits = tmp_path / "deadly", load(name="digits", limit=600)
    network = Digits(deadly)
    batches = Batches(digits.train, 64, mean=digits.mean, std=digits.std, shuffle=True)
    fit(Attachment(network), batches, Training(batch_size=64), steps=200)
    deadly.touch()
    result = tersor.compress(
        network.eval(),
        digits,
        budget=Budget(latency_ms={1: 1000}, minutes=2),
        loss=Loss(deadly),
        workers=2,
        out=tmp_path / "out",
    )
    assert not deadly.exists()
    assert not list(tmp_path.glob("tersor-*")), "the folders of the workers"
    trained = [point for point in [*result.numbers.points, *result.numbers.dominated] if point.steps]
    assert trained
    assert all(point.validation > 40 for point in trained)
    assert not any("died" in reason for reason in result.numbers.dropped.values())


@pytest.mark.usefixtures("fake_search")
def test_removals_before_training_take_time_from_the_workers(tmp_path, monkeypatch):
    limits = []

    def stop(_search, _candidate, _rung, limit):
        limits.append(limit)
        raise InputError("stopped")

    monkeypatch.setattr(rung_training, "_training", stop)
    workers = SimpleNamespace(count=2, train=lambda _trainings: ())
    for unsurveyed in ({}, {Candidate().name: {}}):
        search = searching(tmp_path / str(len(unsurveyed)))
        rung = Rung(members={Candidate().name: 1}, until=search.clock.used + 100.0, unsurveyed=unsurveyed)
        rung_training.train_candidates(search, rung, [Candidate()], workers)
    assert limits[0] - limits[1] == pytest.approx(search.folder.state.costs.survey)
