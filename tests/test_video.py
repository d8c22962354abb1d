"""Networks for videos (N, C, T, H, W): quantized, pruned, saved and exported, with Conv3d in integers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.evaluation.node_profile import node_times
from tersor.evaluation.session import open_session

VIDEOS = torch.rand(4, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Video(nn.Module):
    """A residual network for videos with a Conv1d over time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv3d(16, 16, 3, padding=1),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.over_time, self.head = nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, videos):
        features = self.stem(videos)
        features = torch.relu(features + self.block(features))
        return self.head(torch.relu(self.over_time(features.mean((3, 4)))).mean(2))


@pytest.fixture(scope="module")
def network():
    return Video().eval()


def test_convolutions_of_a_video_network_are_computed_in_integers(network, tmp_path):
    quantized = tersor.quantize(network, [VIDEOS])
    assert tersor.integer_coverage(quantized, VIDEOS).share == 1
    path = tersor.export(quantized, VIDEOS, tmp_path / "video.onnx")
    kinds = Counter(each.kind for each in node_times(path, "onnxruntime", VIDEOS.numpy(), runs=1))
    assert (kinds["QLinearConv"], kinds["Conv"]) == (4, 0)
    expected = network(VIDEOS).detach().numpy()
    found = open_session(path, "onnxruntime").run(VIDEOS.numpy())
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()
    again = tersor.load(Video(), tersor.save(quantized, tmp_path / "saved"))
    torch.testing.assert_close(again.eval()(VIDEOS), quantized(VIDEOS), rtol=0, atol=0)


def test_channels_of_a_video_network_are_removed(network):
    pruned = tersor.prune(network, [{"frames": VIDEOS}], keep_macs=0.5, round_to=1)
    before, after = (tersor.integer_coverage(each, VIDEOS).macs for each in (network, pruned))
    assert after <= 0.5 * before
    assert pruned(VIDEOS).shape == (4, 5)


def test_pixels_of_videos_are_normalized_per_channel(network, tmp_path):
    mean, deviation = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    path = tersor.export(network, VIDEOS, tmp_path / "video.onnx", pixels=(mean, deviation))
    pixels = (255 * VIDEOS).to(torch.uint8)
    normalized = (pixels / 255 - torch.tensor(mean)[:, None, None, None]) / torch.tensor(deviation)[:, None, None, None]
    found = open_session(path, "onnxruntime").run(pixels.numpy())
    np.testing.assert_allclose(found, network(normalized).detach().numpy(), rtol=1e-3, atol=1e-4)
