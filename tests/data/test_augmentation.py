from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.data.augmentation import augmented


def every_crop(image: np.ndarray) -> dict[tuple[int, int, bool], bytes]:
    """All that may become of an image (H, W, 3), by the slow way: pad, crop, flip."""
    height, width, _ = image.shape
    up, left = height // 8, width // 8
    padded = np.pad(image, ((up, up), (left, left), (0, 0)), mode="reflect")
    return {
        (y, x, flip): (crop[:, ::-1] if flip else crop).tobytes()
        for y in range(2 * up + 1)
        for x in range(2 * left + 1)
        for flip in (False, True)
        for crop in [padded[y : y + height, x : x + width]]
    }


@given(height=st.integers(1, 19), width=st.integers(1, 19), seed=st.integers(0, 1000))
def test_crop_flip_crops_the_padded_image(height, width, seed):
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (5, height, width, 3), dtype=torch.uint8, generator=draw)
    for before, after in zip(pixels.numpy(), augmented(pixels, None, "crop_flip", draw)[0].numpy(), strict=True):
        assert after.tobytes() in every_crop(before).values()


def test_all_shifts_are_equally_frequent():
    draw = torch.Generator().manual_seed(0)
    image = torch.arange(16 * 16 * 3).view(1, 16, 16, 3).remainder(251).to(torch.uint8)
    possible = {crop: move for move, crop in every_crop(image[0].numpy()).items()}
    assert len(possible) == 5 * 5 * 2
    after = augmented(image.expand(5000, -1, -1, -1).contiguous(), None, "crop_flip", draw)[0].numpy()
    moves = [possible[each.tobytes()] for each in after]
    for move in possible.values():
        assert 50 < moves.count(move) < 150  # 100 expected, 10 is the standard deviation


def test_flip_mirrors_half_of_the_images_and_shifts_none():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1000, 3, 5, 3), dtype=torch.uint8, generator=draw)
    after, _ = augmented(pixels, None, "flip", draw)
    flipped = (after == pixels.flip(2)).flatten(1).all(1)
    assert (flipped | (after == pixels).flatten(1).all(1)).all()
    assert 400 < int(flipped.sum()) < 600


def test_none_draws_nothing():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.zeros(2, 3, 5, 3, dtype=torch.uint8)
    state = draw.get_state()
    assert augmented(pixels, None, "none", draw)[0] is pixels
    assert torch.equal(draw.get_state(), state)


def test_the_input_batch_is_unchanged():
    pixels = torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8)
    before = pixels.clone()
    augmented(pixels, None, "crop_flip", torch.Generator())
    assert torch.equal(pixels, before)
