"""A run that is killed at a random moment and goes on in a fresh process ends with the same bits."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.torch import load_file

from tersor.export.artifact import read_artifact

AT_ONCE = 2
EPOCH = 8  # steps
RECIPE = """\
model: {name: "tiny:build"}
teacher: {name: "tiny:build", epochs: 3, training: {batch_size: 32}}
data: {name: digits, limit: 128, augment: flip}
checkpoint_every: 1
stages:
  - {name: cut, methods: [{channel_pruning: {keep_macs: 0.6, round_to: 4, estimation_images: 64}}]}
  - name: train
    steps: STEPS
    batch_size: 16
    validate_every: 1
    ema: 0.9
    optimizer: {name: adamw, learning_rate: 0.001}
    methods:
      - {weight_pruning: {sparsity: 0.8, sparsity_schedule: cubic, every: 8}}
      - {qat: {calibration_images: 32}}
      - soft_targets
      - {factor_transfer: {paraphraser_epochs: 2, paraphraser_learning_rate: 0.01}}
"""
NETWORK = """\
from torch import nn

def build(num_classes):
    def conv(width, into):
        return nn.Conv2d(width, into, 3, padding=1, bias=False), nn.BatchNorm2d(into), nn.ReLU()
    return nn.Sequential(*conv(3, 16), *conv(16, 16), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, num_classes))
"""
CHILD = """\
import sys
from pathlib import Path
from tersor.export.numbers import measure
from tersor.checkpoint import Checkpoints
from tersor.export.footprint import Footprint
from tersor.walk import Walk
import tersor.run
module = sys.modules["tersor.run"]
# the second runtime and more rounds add time, and nothing to go on with
sys.modules["tersor.export.numbers"].installed_runtimes = lambda: ["onnxruntime"]
sys.modules["tersor.export.bench"]._FEWEST_GROUPS = 2
Walk.left_by_stages = lambda *_given: {}  # nor do files of every stage
nothing = Footprint(peak_memory_bytes=0, load_ms=0.0)
sys.modules["tersor.export.numbers"].footprint = lambda *_given, **_options: nothing  # nor fresh processes
module.measure = lambda *given, **options: measure(*given, **options, seconds=0.02)
phases = open(sys.argv[3], "a", buffering=1)
def marked(name, function):
    def call(*given, **options):
        phases.write(name + "\\n")
        try:
            return function(*given, **options)
        finally:
            phases.write("other\\n")
    return call
Checkpoints.save = marked("checkpoint", Checkpoints.save)
module._fill = marked("export", module._fill)
module.run(Path(sys.argv[1]), out=Path(sys.argv[2]), resume=True)
"""


def start(folder, out):
    command = [sys.executable, "-c", CHILD, folder / "recipe.yaml", out, folder / f"{out.name}.phases"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)


def finish(folder, out):
    child = start(folder, out)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors.decode()


def weights(out):
    """Tensors of every stage's end, by stage."""
    return {
        path.name.rsplit("-", 1)[0]: load_file(path / "tensors.safetensors")
        for path in sorted((out / "checkpoints").iterdir())
    }


def told(out):
    """What the last stage's end tells of all stages, but for the clock."""
    *_, end = sorted((out / "checkpoints").iterdir())
    stages = json.loads((end / "clock.json").read_text())["told"]["stages"]
    return [{key: stage[key] for key in stage if key not in {"minutes", "training_seconds"}} for stage in stages]


def same(first, second):
    return first.keys() == second.keys() and all(
        first[stage].keys() == second[stage].keys()
        and all(first[stage][key].equal(second[stage][key]) for key in first[stage])
        for stage in first
    )


def killed_and_resumed(folder, kills, seed, steps):
    """The phases that the kills fell into; more steps make more of a run the writing of checkpoints."""
    (folder / "recipe.yaml").write_text(RECIPE.replace("STEPS", str(steps)))
    (folder / "tiny.py").write_text(NETWORK)
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as several:  # as long as a run beside others takes
        list(several.map(lambda name: finish(folder, folder / name), [f"whole{number}" for number in range(AT_ONCE)]))
    length = time.monotonic() - began
    expected, as_told = weights(folder / "whole0"), told(folder / "whole0")
    assert len(as_told[-1]["validation_by_epoch"]) == steps // EPOCH
    model = (folder / "whole0" / "model.onnx").read_bytes()
    draw = random.Random(seed)
    moments = [draw.uniform(0, length) for _ in range(kills)]

    def kill(number):
        out = folder / f"killed{number}"
        child = start(folder, out)
        time.sleep(moments[number])
        child.send_signal(signal.SIGKILL)
        child.communicate()
        phases = folder / f"{out.name}.phases"
        reached = phases.read_text().split() if phases.exists() else []
        hit = "ended" if out.exists() else (reached[-1] if reached else "before")
        finish(folder, out)
        assert same(weights(out), expected), f"kill {number}, in {hit}"
        assert told(out) == as_told, f"kill {number}, in {hit}"
        assert read_artifact(out).model.read_bytes() == model, "whole, every file as the manifest says"
        assert not (folder / f"{out.name}.checkpoints").exists()
        shutil.rmtree(out)
        return hit

    with ThreadPoolExecutor(AT_ONCE) as several:
        return list(several.map(kill, range(kills)))


def test_killed_three_times_it_ends_with_the_same_bits(tmp_path):
    killed_and_resumed(tmp_path, kills=3, seed=0, steps=24)


@pytest.mark.slow
def test_killed_fifty_times_it_ends_with_the_same_bits(tmp_path):
    hit = killed_and_resumed(tmp_path, kills=50, seed=1, steps=400)
    counts = {phase: hit.count(phase) for phase in sorted(set(hit))}
    sys.stdout.write(f"{counts}\n")
    assert counts.get("checkpoint", 0) >= 5
    assert counts.get("export", 0) >= 5
