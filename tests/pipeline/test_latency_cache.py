"""A resumed run reuses its latency measurements, so that its decisions are the same."""

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tersor.checkpoint.model_folder import load
from tersor.checkpoint.store import Checkpoints
from tersor.core.progress import NullProgress
from tersor.core.target import Target
from tersor.evaluation.costs import macs_ratio
from tersor.pipeline.latency_cache import FILE, CachedLatencyRatio
from tersor.pipeline.run import run
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages
from tersor.recipe import parse

IMAGE = torch.rand(1, 3, 8, 8)
RECIPE = """\
model: {name: "test_latency_cache:build"}
data: {name: digits, limit: 48}
checkpoint_every: 2
stages:
  - name: cut
    steps: 4
    batch_size: 16
    methods: [{channel_pruning: {keep_latency: 0.6, round_to: 2, estimation_images: 16}}]
"""


class Noisy:
    """A machine with random latencies that counts the measurements."""

    def __init__(self, seed=0):
        self.draw = random.Random(seed)
        self.asked = 0

    def __call__(self, original, example, target, progress=None):
        def ratio(_network):
            self.asked += 1
            return self.draw.uniform(0.3, 0.9)

        return ratio


def build(num_classes):
    """A network whose inner channels can be removed in 15 steps."""
    inner = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


def net(width):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(36 * width, 2))


def test_networks_with_the_same_shapes_get_the_cached_ratio_even_in_another_process(tmp_path):
    file, noisy = tmp_path / FILE, Noisy()
    first = CachedLatencyRatio(noisy, file)
    ratios = [first(net(8), IMAGE, Target())(net(width)) for width in (4, 4, 5)]
    assert ratios[0] == ratios[1] != ratios[2]
    assert noisy.asked == 2
    again = CachedLatencyRatio(Noisy(seed=1), file)
    assert [again(net(8), IMAGE, Target())(net(width)) for width in (4, 5)] == ratios[1:]
    others = {
        first(net(9), IMAGE, Target())(net(4)),
        first(net(8), torch.rand(1, 3, 9, 8), Target())(net(4)),
        first(net(8), IMAGE, Target(runtime="openvino"))(net(4)),
    }
    assert not others & set(ratios)
    assert noisy.asked == 5
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_rehearsal_uses_the_ratio_of_the_macs():
    assert macs_ratio(net(8), IMAGE, Target())(net(4)) == pytest.approx(0.5)


class Stops(NullProgress):
    """Interrupts the run between the first checkpoint and the second."""

    steps = 0

    def advance(self, items=1, **shown):
        self.steps += bool(shown)
        if self.steps == 3:
            raise KeyboardInterrupt


def run_recipe(folder, machine, progress=None):
    experiment = prepare(parse(RECIPE, "latency.yaml"), model=None, data=None, progress=NullProgress())
    folder.mkdir(exist_ok=True)
    experiment = replace(experiment, latency=CachedLatencyRatio(machine, folder / FILE))
    model, (record,) = run_stages(experiment, Checkpoints(folder), progress or NullProgress())
    return model.state_dict(), record.notes


def test_a_resumed_stage_keeps_the_same_channels(tmp_path):
    whole, notes = run_recipe(tmp_path / "whole", Noisy(seed=1))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tmp_path / "stopped", Noisy(seed=1), Stops())
    changed = Noisy(seed=2)
    resumed, notes_resumed = run_recipe(tmp_path / "stopped", changed)
    assert changed.asked == 0
    assert notes_resumed == notes
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_without_the_cache_the_channels_differ(tmp_path):
    widths = {
        tuple(value.shape[0] for value in run_recipe(tmp_path / str(seed), Noisy(seed))[0].values() if value.ndim)
        for seed in (1, 2)
    }
    assert len(widths) == 2


@pytest.mark.slow
def test_a_run_measures_latency_once_and_reports_it(tmp_path, monkeypatch):
    noisy = Noisy(seed=1)
    monkeypatch.setattr(sys.modules["tersor.pipeline.run"], "latency_ratio", noisy)
    folder = run(parse(RECIPE, "latency.yaml"), out=tmp_path / "out")
    (stage,) = json.loads((folder / "numbers.json").read_text())["stages"]
    assert 0 < noisy.asked <= 8
    assert any("of the measured latency at batch size 1" in note for note in stage["notes"])
    again = load(build(10), folder)
    assert again(IMAGE.repeat(1, 1, 2, 2)).shape == (1, 10)
