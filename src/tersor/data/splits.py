"""Three sets of images with the same classes."""

from __future__ import annotations

from dataclasses import dataclass

from tersor.data.image_sets import Images

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Splits:
    """What a data set is, once it is loaded.

    Args:
        train: images to learn from.
        validation: images to choose by; may be empty.
        test: images to report on, and for nothing else.
        classes: the name of each class number.
        mean: of red, green and blue in [0, 1], subtracted from every pixel.
        std: of red, green and blue in [0, 1], what every pixel is divided by after that.
    """

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    mean: Channels | None = None
    std: Channels | None = None
