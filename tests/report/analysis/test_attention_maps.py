"""Attention maps: squared outputs averaged over the channels, scaled from black to white."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tersor.data import Batches
from tersor.data.image_sets import Pixels
from tersor.report.analysis.attention_maps import attention_maps


class Doubled(nn.Module):
    """Two channels, x and -2x, computed from the first channel of the images."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1, bias=False)
        self.layer.weight.data = torch.tensor([[1.0, 0, 0], [-2.0, 0, 0]])[..., None, None]

    def forward(self, images):
        return self.layer(images).mean((2, 3))


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_attention_maps_of_six_images_are_scaled_to_their_value_range():
    pixels = torch.full((12, 4, 4, 3), 191, dtype=torch.uint8)
    pixels[:, 0], pixels[:, 1], pixels[:, 3] = 255, 223, 0
    test = Batches(Pixels(pixels, torch.arange(12) % 2), 4, mean=(0.5,) * 3, std=(0.5,) * 3)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    index = torch.arange(1, 12)
    found = attention_maps({"doubled": Doubled().eval(), "flat": flat.eval()}, test, index)
    assert found["layers"] == {"doubled": ["layer"]}, "a network without feature maps is left out"
    assert [image["index"] for image in found["images"]] == [1, 3, 5, 7, 9, 11]
    for image in found["images"]:
        (png,) = image["maps"]["doubled"]
        shown = decoded(png)
        assert shown.shape == (48, 48, 3)
        squares = [(2 * value / 255 - 1) ** 2 for value in (255, 223, 191, 0)]
        expected = [255 * (each - squares[2]) / (1 - squares[2]) for each in squares]
        assert [int(shown[row, 0, 0]) for row in (0, 18, 30, 47)] == pytest.approx(expected, abs=1)
    pixels[:] = 7
    even = attention_maps({"doubled": Doubled().eval()}, test, index)["images"][0]["maps"]["doubled"][0]
    assert not decoded(even).any()
