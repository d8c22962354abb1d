"""Files from other people are read or raise one error, whatever is in them. `bench/fuzz.py` reads ten thousand."""

import random
import resource
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import NAMES, kind
from mutation import MARKER

from tersor.core.errors import InputError

HERE = Path(__file__).parent
SEEDS = st.integers(0, 2**40)


def read(name, seed):
    """Read a file that was mutated with the given seed; only an InputError may be raised."""
    draw = random.Random(f"{name} {seed}")
    content = kind(name).mutate(draw.choice(kind(name).seeds), draw)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"), suppress(InputError):
        kind(name).read(content, Path(folder))
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "checkpoint"])
@given(seed=SEEDS)
@settings(max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_changed_file_is_read_or_refused(name, seed):
    read(name, seed)


@given(seed=SEEDS)
@settings(max_examples=4, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_changed_checkpoint_is_gone_on_with_or_refused(seed):
    read("checkpoint", seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
def test_many_changed_files_are_read_or_refused(name, seed):
    read(name, seed)


@pytest.mark.parametrize("name", NAMES)
def test_valid_files_are_read_and_payloads_raise(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = 0
    for number, content in enumerate(kind(name).seeds):
        (tmp_path / str(number)).mkdir()
        try:
            kind(name).read(content, tmp_path / str(number))
        except InputError:
            refused += 1
    assert refused == {"weights": 4, "image": 1}.get(name, 0), "another network, payloads; a program"
    assert not Path(MARKER).exists()


def test_the_payload_is_executed_if_nothing_prevents_it(tmp_path, monkeypatch):
    """Otherwise the tests above would prove nothing."""
    import pickle

    monkeypatch.chdir(tmp_path)
    pickle.loads(next(seed for seed in kind("weights").seeds if seed.startswith(b"\x80") and MARKER.encode() in seed))
    assert Path(MARKER).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe", "structure", "numbers"])
def test_coverage_guided_fuzzing_finds_no_error(name, tmp_path):
    pytest.importorskip("atheris", reason="pip install atheris (Linux and macOS)")
    # Linux passes the largest memory of this process on to its children
    memory = 2048 + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    options = ["-runs=2000", "-max_total_time=60", "-max_len=20000", f"-rss_limit_mb={memory}"]
    command = [sys.executable, str(HERE / "guided.py"), name, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2000 runs" in done.stderr or "Done " in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / MARKER).exists()
