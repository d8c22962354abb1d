"""The laws that need child processes: resuming in a new process, and training in two processes."""

from __future__ import annotations

import os
import subprocess
import sys

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
    child = [sys.executable, "subjects.py", "resume", str(folder / "stopped")]
    subprocess.run(child, cwd=FOLDER, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_resume(name, resumed):
    """A run resumed in a new process ends with the bits of an uninterrupted run."""
    skip_if_exempt(name, "resume")
    assert equal_states(end(resumed / "whole" / name), end(resumed / "stopped" / name))
    assert stage_record(resumed / "whole" / name) == stage_record(resumed / "stopped" / name)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All methods and the demo recipe, in one launch of two gloo processes with different seeds."""
    out = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "subjects.py", "processes", str(out)],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", [*NAMES, subjects.DEMO.stem])
def test_processes(name, two_processes):
    """Two processes with different seeds and images end with the same masks, scales and weights."""
    if name in NAMES:
        skip_if_exempt(name, "processes")
    first, second = (load_file(two_processes / f"{name}-{rank}.safetensors") for rank in range(2))
    assert equal_states(first, second)
