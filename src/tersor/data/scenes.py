"""Scenes of several digits on textured backgrounds: data for segmentation and detection without a download.

The digits are those of scikit-learn, 8x8 pixels, enlarged. Training and test scenes show different ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TRAIN, TEST = 2000, 500
"""Number of scenes."""

SIDE = 64
"""Default height and width of a scene in pixels."""

CLASSES = ("background", *(str(digit) for digit in range(10)))

_SIZES = (0.22, 0.5)
"""Side of a digit, as a share of the scene's shorter side."""

_OVERLAP = 0.15
"""Largest share of a digit's box that the box of another one may cover."""

_MOST = 5
"""Largest number of digits in a scene; at least one."""

_TRIES = 8
"""Places that are tried for a digit; one that overlaps too much at all of them is left out."""

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        pixels: (H, W, 3) uint8.
        mask: (H, W) uint8; 0 is the background, 1 + d the digit d.
        boxes: (K, 4) float32, left, top, right and bottom in pixels, around each digit's part of the mask before others
            covered it.
        labels: (K,) int64, 1 + d.
    """

    pixels: Pixels
    mask: Pixels
    boxes: Floats
    labels: NDArray[np.int64]


class Scenes:
    """Scenes that are drawn when they are first needed; a scene depends only on its number and the seed.

    Args:
        digits: (N, 8, 8), the ink of each digit in [0, 1].
        labels: (N,), which digit it is.
        size: height and width of a scene in pixels.
        seed: 0 or more.
    """

    def __init__(self, digits: NDArray[Any], labels: NDArray[Any], size: tuple[int, int], seed: int) -> None:
        self._digits = digits.astype(np.float32)
        self._labels = labels
        self._size = size
        self._seed = seed
        self._drawn: dict[int, Scene] = {}

    def __getitem__(self, number: int) -> Scene:
        if number not in self._drawn:
            random = np.random.default_rng((self._seed, number))
            self._drawn[number] = _scene(self._digits, self._labels, self._size, random)
        return self._drawn[number]


def _scene(digits: Floats, labels: NDArray[Any], size: tuple[int, int], random: np.random.Generator) -> Scene:
    pixels = _background(size, random)
    mask = np.zeros(size, np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    shown: list[int] = []
    for number in random.integers(len(digits), size=random.integers(1, _MOST + 1)):
        opacity = _enlarged(digits[number], round(random.uniform(*_SIZES) * min(size)))
        place = _free_place(opacity > 0.5, size, boxes, random)
        if place is None:
            continue
        top, left, box = place
        window = np.s_[top : top + len(opacity), left : left + len(opacity)]
        _paint(pixels[window], opacity, random)
        mask[window][opacity > 0.5] = 1 + labels[number]
        boxes.append(box)
        shown.append(1 + int(labels[number]))
    return Scene(
        pixels.round().astype(np.uint8), mask, np.array(boxes, np.float32).reshape(-1, 4), np.array(shown, np.int64)
    )


def _background(size: tuple[int, int], random: np.random.Generator) -> Floats:
    """A gradient between two colors with stripes and noise: (H, W, 3) float32 in 0..255."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) / max(size)
    along, across = (np.cos(each) * x + np.sin(each) * y for each in random.uniform(0, 2 * np.pi, 2).astype(np.float32))
    share = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
    first, second = random.uniform(40, 215, (2, 3)).astype(np.float32)
    waves = np.float32(2 * np.pi * random.uniform(2, 9))
    stripes = np.float32(random.uniform(0, 25)) * np.sin(waves * across)
    noise = np.float32(random.uniform(2, 12)) * random.standard_normal((*size, 3), np.float32)
    colours = first + share[..., None] * (second - first)
    return (colours + stripes[..., None] + noise).clip(0, 255)


def _enlarged(digit: Floats, side: int) -> Floats:
    """The ink (8, 8) of a digit, enlarged to (side, side)."""
    return np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)


def _free_place(
    shape: NDArray[np.bool_], size: tuple[int, int], boxes: list[tuple[int, int, int, int]], random: np.random.Generator
) -> tuple[int, int, tuple[int, int, int, int]] | None:
    """Top and left of a digit where it covers little of the others, and its box there; None if none was found."""
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    for _ in range(_TRIES):
        top, left = (int(random.integers(0, length - len(shape) + 1)) for length in size)
        box = (
            left + int(columns[0]),
            top + int(rows[0]),
            left + int(columns[-1]) + 1,
            top + int(rows[-1]) + 1,
        )
        if all(_covered(box, other) <= _OVERLAP for other in boxes):
            return top, left, box
    return None


def _covered(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """The intersection of two boxes, as a share of the smaller one."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, other)]
    return max(width, 0) * max(height, 0) / min(areas)


def _paint(window: Floats, opacity: Floats, random: np.random.Generator) -> None:
    """Paint a digit in a color that is brighter or darker than the background there, in place."""
    mean = float(window.mean())
    contrast = random.uniform(60, 120)
    level = mean + contrast if mean < 128 else mean - contrast
    colour = np.clip(level + random.uniform(-30, 30, 3), 0, 255)
    window += opacity[..., None] * (colour.astype(np.float32) - window)
