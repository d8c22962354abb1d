"""A run in which a fault occurs: exit code 2, one message, no partial files, and --resume continues where possible."""

import errno
import importlib
import os
import sys

import pytest
import torch

from tersor import cli
from tersor.checkpoint import store
from tersor.training.objective import Objective

RECIPE = """\
model: {name: "faulty:Network"}
data: {name: digits, limit: 40}
checkpoint_every: 1
stages: [{name: train, steps: 4, batch_size: 20, optimizer: {learning_rate: RATE}}]
"""
NETWORK = """\
from torch import nn

class Network(nn.Sequential):
    def __init__(self, num_classes):
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), *pooled, nn.Linear(4, num_classes))
"""


@pytest.fixture
def tersor(tmp_path, monkeypatch, capfd):
    """A function that runs the recipe with output folder `out` and returns exit code and error stream."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "faulty.py").write_text(NETWORK)

    def run(*options, rate=0.1):
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace("RATE", str(rate)))
        monkeypatch.setattr(sys, "argv", ["tersor", "run", "recipe.yaml", "--out", "out", *options])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, capfd.readouterr().err

    return run


def left(folder):
    return sorted(
        path.name for path in folder.iterdir() if path.name not in {"faulty.py", "__pycache__", "recipe.yaml"}
    )


def one_message(errors):
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, errors
    assert "Traceback" not in errors
    return told[0]


def counted_steps(monkeypatch, step=None, error=None):
    """A list that grows with each step of the training; the forward pass of `step` raises `error`."""
    forward, steps = Objective.forward, []

    def counts(self, batch):
        if len(batch.images) == 20:  # before the training, the loss is computed for two images
            steps.append(0)
            if len(steps) == step:
                raise error
        return forward(self, batch)

    monkeypatch.setattr(Objective, "forward", counts)
    return steps


def test_a_loss_that_becomes_nan_is_reported_with_the_last_good_checkpoint(tersor, tmp_path):
    code, errors = tersor(rate=1e30)
    assert code == 2
    message = one_message(errors)
    assert "the loss 'labels' is" in message
    assert "01-train-0000001-" in message
    assert left(tmp_path) == ["out.checkpoints"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_out_of_memory_suggests_a_batch_size_and_the_run_can_be_resumed(tersor, tmp_path, monkeypatch, error):
    with monkeypatch.context() as during:
        counted_steps(during, 3, error)
        code, errors = tersor()
    assert code == 2
    assert "write batch_size: 10 and accumulate: 2." in one_message(errors)
    assert left(tmp_path) == ["out.checkpoints"]
    steps = counted_steps(monkeypatch)
    monkeypatch.setattr(
        importlib.import_module("tersor.pipeline.run"), "_fill", lambda folder, *_, **_named: full(folder)
    )
    code, errors = tersor("--resume")
    assert len(steps) == 2, "the other two were done before"
    assert code == 2
    assert "No space left" in one_message(errors)
    assert "--resume" in errors
    assert left(tmp_path) == ["out.checkpoints"], "nothing of the folder"
    assert "partial" not in left(tmp_path / "out.checkpoints")


def full(folder):
    (folder / "model.onnx").write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.onnx"))


def test_out_of_memory_before_the_first_step_is_reported(tersor, tmp_path, monkeypatch):
    def fails(*_given, **_options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("tersor.pipeline.stages.chain", fails)
    code, errors = tersor()
    assert code == 2
    assert "not enough memory" in one_message(errors)
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_failed_checkpoint_write_keeps_the_earlier_checkpoint(tersor, tmp_path, monkeypatch, number):
    write, calls = store.save_file, []

    def refuses(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(number, os.strerror(number), str(path))
        write(tensors, path)

    monkeypatch.setattr(store, "save_file", refuses)
    code, errors = tersor()
    assert code == 2
    assert os.strerror(number) in one_message(errors)
    kept = left(tmp_path / "out.checkpoints")
    assert [name[:16] for name in kept if name.startswith("01")] == ["01-train-0000001", "01-train-0000002"]
    assert "partial" not in kept
    assert left(tmp_path) == ["out.checkpoints"]


def test_after_a_damaged_checkpoint_the_run_resumes_from_the_earlier_one(tersor, tmp_path, monkeypatch):
    with monkeypatch.context() as during:
        counted_steps(during, 4, KeyboardInterrupt())
        assert tersor()[0] == 130
    newest = sorted((tmp_path / "out.checkpoints").glob("01-*"))[-1] / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    steps = counted_steps(monkeypatch)
    monkeypatch.setattr(
        importlib.import_module("tersor.pipeline.run"), "_fill", lambda folder, *_, **_named: full(folder)
    )
    tersor("--resume")
    assert len(steps) == 2, "the third is done again"
