"""A small network and data for the laws, and runs of every method on them.

As a script, under `accelerate launch`, it runs every method in several processes: python subjects.py OUT
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor import methods as registry
from tersor.checkpoint.store import Checkpoints
from tersor.core import distributed
from tersor.core.progress import NullProgress, ProgressReporter
from tersor.data import load
from tersor.pipeline import stages
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.setup import prepare
from tersor.recipe import Recipe, Stage, parse, read
from tersor.training.attachment import Attachment
from tersor.training.method import Method

DEMO = Path(__file__).parents[2] / "recipes" / "digits.yaml"
STEPS = 6
CHECKPOINT_STEP, STOPPED_STEP = 3, 5
"""The step after which a checkpoint is written, and the one, in the second epoch, in which the process stops."""
RECIPE = """\
model: {name: "subjects:Subject"}
teacher: {name: "subjects:Subject", epochs: 1, training: {batch_size: 64, optimizer: {learning_rate: 0.05}}}
data: {name: digits, limit: 80, augment: flip}
checkpoint_every: 3
stages: [{name: law, batch_size: 16, steps: 6, validate_every: 1, optimizer: {learning_rate: 0.02}}]
"""


class Subject(nn.Module):
    """A residual network with BatchNorm, an addition, a bias and dropout."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.1)
        self.linear = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        return self.linear(self.dropout(x.mean((2, 3))))


def build_method(name: str, kind: str) -> Method:
    """A method by name, with the parameters of `kind`: "defaults", "example" or "off"."""
    cls: Any = registry.get(name)
    return cls(**({} if kind == "defaults" else getattr(cls, kind)))


def exempt(name: str, law: str) -> str | None:
    """The reason why a method is exempt from a law, or None."""
    return getattr(registry.get(name), "exempt", {}).get(law)


def recipe(*methods: Method, seed: int = 0, **training: Any) -> Recipe:
    """A recipe with one stage of these methods."""
    plain = parse(RECIPE, "law.yaml")
    stage = Stage.model_validate({**plain.stages[0].model_dump(), "methods": methods, **training})
    return plain.model_copy(update={"seed": seed, "stages": (stage,)})


def experiment_of(given: Recipe) -> Experiment:
    """The experiment of a recipe."""
    return prepare(given, model=None, data=None, progress=NullProgress())


def run_recipe(given: Recipe, folder: Path, progress: ProgressReporter | None = None) -> nn.Module:
    """Run a recipe; return the model after the last stage."""
    experiment, checkpoints = experiment_of(given), Checkpoints(folder)
    progress = progress or NullProgress()
    experiment = replace(experiment, teacher=stages.train_teacher(experiment, checkpoints, NullProgress()))
    attach = stages.attach

    def attached(*arguments: Any, **options: Any) -> Attachment:
        attachment = attach(*arguments, **options)
        if isinstance(progress, StateRecorder):
            progress.model = attachment.model
        return attachment

    stages.attach = attached
    try:
        return stages.run_stages(experiment, checkpoints, progress)[0]
    finally:
        stages.attach = attach


class StateRecorder(NullProgress):
    """Records weights, masks and scales of each process after its last step, before they are broadcast.

    Running statistics and ranges are excluded: they depend on the images of each process.
    """

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.model: nn.Module | None = None
        self.state: dict[str, Tensor] = {}

    def advance(self, amount: int = 1, **shown: float) -> None:
        self.left -= bool(shown)
        if not self.left:
            assert self.model is not None
            state = self.model.state_dict()
            own = ("running_", "num_batches_tracked", "quantizers.")
            self.state = {key: state[key].clone() for key in state if not any(part in key for part in own)}


class Stops(NullProgress):
    """Interrupts the training in the middle of a stage, between two checkpoints."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, amount: int = 1, **shown: float) -> None:
        self.steps += bool(shown)
        if self.steps == STOPPED_STEP:
            raise KeyboardInterrupt


@functools.cache
def images(count: int = 300) -> Tensor:
    """Normalized test images (N, 3, 8, 8)."""
    experiment = experiment_of(recipe())
    return next(iter(experiment.batches(load(name="digits").test, count))).images


def end(folder: Path) -> dict[str, Tensor]:
    """The state at the end of the stage, and the training state after the last step without the clock."""
    found, last = Checkpoints(folder).end_of(1), Checkpoints(folder).newest_within(1)
    assert found is not None
    assert last is not None
    assert last.step == STEPS
    return found.tensors() | {f"last.{key}": value for key, value in last.tensors().items() if key != "log.seconds"}


def stage_record(folder: Path) -> dict[str, Any]:
    """The record of the stage, without times."""
    found = Checkpoints(folder).end_of(1)
    assert found is not None
    (stage,) = found.record["stages"]
    return {key: value for key, value in stage.items() if key not in {"minutes", "training_seconds"}}


def resume(folder: Path) -> None:
    """Resume the interrupted runs of all methods."""
    _record_once()
    for name in registry.names():
        run_recipe(recipe(build_method(name, "example")), folder / name)


def _record_once() -> None:
    import recorded_once  # not found by the processes that accelerate launches

    recorded_once.pytest_configure()


def rank_of_two(rank: int, port: int, out: Path) -> None:
    """Run every method as one of two processes, as `accelerate launch` starts them."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _record_once()
    processes(out, demo=False)


def processes(out: Path, *, demo: bool) -> None:
    """Run every method, and the demo, as one of several processes, and save the models."""
    distributed.init_process_group()
    here = distributed.rank()
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, here)
    distributed.broadcast_from_rank0(layer)
    save_file(layer.state_dict(), out / f"broadcast-{here}.safetensors")
    given = {name: recipe(build_method(name, "example"), seed=here) for name in registry.names()}
    shorter = ["data.limit=192", "teacher.epochs=1", "stages.0.epochs=1", "stages.1.epochs=1", f"seed={here}"]
    shorter += [f"{training}.lr_schedule.warmup_epochs=0" for training in ("teacher.training", "stages.0")]
    if demo:
        given[DEMO.stem] = read(DEMO, shorter)
    for name, each in given.items():
        recorder = StateRecorder(STEPS if name != DEMO.stem else 0)
        model = run_recipe(each, out / name, recorder)
        assert recorder.state or name == DEMO.stem
        state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
        state |= {f"recorded.{key}": value.contiguous() for key, value in recorder.state.items()}
        save_file(state, out / f"{name}-{here}.safetensors")


if __name__ == "__main__":
    processes(Path(sys.argv[1]), demo=True)
