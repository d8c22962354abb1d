"""Latency against another network's, in the runtime."""

import pytest
import torch
from torch import nn

from tersor.core.target import Target
from tersor.core.watch import Unwatched
from tersor.export import bench
from tersor.export.stopwatch import RuntimeStopwatch

IMAGE = torch.rand(1, 3, 64, 64)


def net(layers):
    return nn.Sequential(nn.Conv2d(3, 32, 3), *[nn.Conv2d(32, 32, 3, padding=1) for _ in range(layers)]).append(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    )


class Heard(Unwatched):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_more_work_takes_longer_and_is_told(runtime, monkeypatch):
    pytest.importorskip(runtime)
    monkeypatch.setattr(bench, "_FEWEST_GROUPS", 2)
    heard = Heard()
    ratio = RuntimeStopwatch(heard, seconds=0.5).against(net(4), IMAGE, Target(runtime=runtime))
    less, more = ratio(net(0)), ratio(net(16))
    assert 0 < less < 1 < more  # a twelfth and four times of the work: a busy machine blurs less than that
    for line, value in zip(heard.lines, (less, more), strict=True):
        assert f"at batch 1 in {runtime}, {value:.3f} of the original's" in line
