"""Latency relative to another network, measured in the runtime."""

import dataclasses

import pytest
import torch
from torch import nn

from tersor.core.progress import NullProgress
from tersor.core.target import Target
from tersor.evaluation import latency, latency_ratio
from tersor.evaluation.session import open_session

IMAGE = torch.rand(1, 3, 8, 8)


def net(layers):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *[nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers)]).append(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    )


class RecordedLines(NullProgress):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_the_ratio_of_measured_times_is_returned_and_reported(runtime, monkeypatch):
    """The clock is replaced: each run advances it by the size of its file in bytes."""
    pytest.importorskip(runtime)
    now = 0.0
    sizes = []

    def opened(path, name):
        session, size = open_session(path, name), path.stat().st_size
        sizes.append(size)

        def infer(images):
            nonlocal now
            now += size
            return session.infer(images)

        return dataclasses.replace(session, infer=infer)

    monkeypatch.setattr(latency_ratio, "open_session", opened)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    monkeypatch.setattr(latency, "_MIN_GROUPS", 2)
    recorded = RecordedLines()
    ratio = latency_ratio.latency_ratio(net(2), IMAGE, Target(runtime=runtime), seconds=0.5, progress=recorded)
    less, more = ratio(net(0)), ratio(net(4))
    small, middle, large = sorted(set(sizes))
    assert less == pytest.approx(small / middle)
    assert more == pytest.approx(large / middle)
    for line, value in zip(recorded.lines, (less, more), strict=True):
        assert f"at batch 1 in {runtime}, {value:.3f} times the original's" in line
