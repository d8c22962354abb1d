"""The laws that need processes of their own: going on in a fresh one, and training in two at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import subjects
from safetensors.torch import load_file
from subjects import Stops, end, made, recipe, run_recipe, told
from test_laws import FOLDER, NAMES, kept, same


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Every method run to its end here; and stopped here, to go on in one fresh process."""
    folder = tmp_path_factory.mktemp("resume")
    sys.path.insert(0, str(FOLDER))
    for name in NAMES:
        given = recipe(made(name, "example"))
        run_recipe(given, folder / "whole" / name)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(given, folder / "stopped" / name, Stops())
        *_, newest = sorted(path.name for path in (folder / "stopped" / name).glob("01-law-*"))
        assert newest[:15] == f"01-law-{subjects.KEPT:07d}-"
    sys.path.remove(str(FOLDER))
    child = [sys.executable, "subjects.py", "resume", str(folder / "stopped")]
    subprocess.run(child, cwd=FOLDER, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_resume(name, resumed):
    """Stopped anywhere and gone on with in a fresh process, it ends with the bits of a run that never stopped."""
    kept(name, "resume")
    assert same(end(resumed / "whole" / name), end(resumed / "stopped" / name))
    assert told(resumed / "whole" / name) == told(resumed / "stopped" / name)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All methods and the demo's recipe, in one launch of two gloo processes, each with a seed of its own."""
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
    """Two processes of different seeds and images end with the same masks, scales and weights."""
    if name in NAMES:
        kept(name, "processes")
    first, second = (load_file(two_processes / f"{name}-{rank}.safetensors") for rank in range(2))
    assert same(first, second)
