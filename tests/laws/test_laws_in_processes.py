"""The laws that need child processes: resuming in a new process, and training in two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import forked
import pytest
import subjects
from safetensors.torch import load_file
from subjects import Stops, build_method, end, recipe, run_recipe, stage_record
from test_laws import FOLDER, NAMES, equal_states, skip_if_exempt


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Runs of every method: uninterrupted ones, and interrupted ones that were resumed in a new process."""
    folder = tmp_path_factory.mktemp("resume")
    sys.path.insert(0, str(FOLDER))
    for name in NAMES:
        given = recipe(build_method(name, "example"))
        run_recipe(given, folder / "whole" / name)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(given, folder / "stopped" / name, Stops())
        *_, newest = sorted(path.name for path in (folder / "stopped" / name).glob("01-law-*"))
        assert newest[:15] == f"01-law-{subjects.CHECKPOINT_STEP:07d}-"
    sys.path.remove(str(FOLDER))
    join(forked.start(subjects.resume, folder / "stopped"))
    return folder


def join(*children):
    """Wait until the processes have ended without an error."""
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * len(children)


@pytest.mark.parametrize("name", NAMES)
def test_resume(name, resumed):
    """A run resumed in a new process ends with the bits of an uninterrupted run."""
    skip_if_exempt(name, "resume")
    assert equal_states(end(resumed / "whole" / name), end(resumed / "stopped" / name))
    assert stage_record(resumed / "whole" / name) == stage_record(resumed / "stopped" / name)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All methods in two gloo processes with different seeds."""
    out = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join(*(forked.start(subjects.rank_of_two, rank, port, out) for rank in range(2)))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_processes(name, two_processes):
    """Two processes with different seeds and images end with the same masks, scales and weights."""
    skip_if_exempt(name, "processes")
    require_same_ends(name, two_processes)


def test_the_second_process_gets_the_weights_of_the_first(two_processes):
    require_same_ends("broadcast", two_processes)
    assert load_file(two_processes / "broadcast-1.safetensors")["weight"] == 0


def require_same_ends(name, out):
    first, second = (load_file(out / f"{name}-{rank}.safetensors") for rank in range(2))
    assert equal_states(first, second)


@pytest.mark.slow
def test_processes_launched_by_accelerate_finish(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "subjects.py", str(tmp_path)],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in [*NAMES, subjects.DEMO.stem]:
        if name not in NAMES or subjects.exempt(name, "processes") is None:
            require_same_ends(name, tmp_path)
