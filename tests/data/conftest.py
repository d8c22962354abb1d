"""Tiny image folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def draw_images(tmp_path):
    """A function that writes `count` random images into `tmp_path / place`, and returns the folder `tmp_path`."""
    random = np.random.default_rng(0)

    def draw(place: str, count: int, size: tuple[int, int] = (6, 4), suffix: str = ".png") -> Path:
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03}{suffix}")
        return tmp_path

    return draw


@pytest.fixture
def two_classes(draw_images):
    """`train` and `test` with 8 and 2 images of each of the classes cat and dog, 6 pixels wide and 4 high."""
    for name in ("dog", "cat"):
        draw_images(f"train/{name}", 8)
        folder = draw_images(f"test/{name}", 2)
    return folder
