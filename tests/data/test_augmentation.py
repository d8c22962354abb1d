from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import InputError
from tersor.data.augmentation import augmented, described, resolve


def every_crop(image: np.ndarray) -> dict[tuple[int, int, bool], bytes]:
    """All possible augmentations of an image (H, W, 3), by a slow reference: pad, crop, flip."""
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


def test_all_crops_and_flips_are_equally_frequent():
    draw = torch.Generator().manual_seed(0)
    image = torch.arange(16 * 16 * 3).view(1, 16, 16, 3).remainder(251).to(torch.uint8)
    possible = {crop: move for move, crop in every_crop(image[0].numpy()).items()}
    assert len(possible) == 5 * 5 * 2
    after = augmented(image.expand(5000, -1, -1, -1).contiguous(), None, "crop_flip", draw)[0].numpy()
    moves = [possible[each.tobytes()] for each in after]
    for move in possible.values():
        assert 50 < moves.count(move) < 150  # 100 expected, 10 is the standard deviation


def test_flip_mirrors_half_of_the_images_and_does_not_shift_any():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1000, 3, 5, 3), dtype=torch.uint8, generator=draw)
    after, _ = augmented(pixels, None, "flip", draw)
    flipped = (after == pixels.flip(2)).flatten(1).all(1)
    assert (flipped | (after == pixels).flatten(1).all(1)).all()
    assert 400 < int(flipped.sum()) < 600


def test_none_returns_the_pixels_and_draws_no_random_numbers():
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


TRANSFORMS = [
    "RandomHorizontalFlip",
    {"RandomAffine": {"degrees": 20, "translate": [0.2, 0.2]}},
    {"RandomCrop": {"size": [8, 9], "padding": 2}},
]


def stripes_and_masks(batch: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 8, 9, 3) whose red channel is 80 times the class of the mask (B, 8, 9)."""
    masks = torch.arange(8 * 9).view(8, 9).remainder(3).expand(batch, 8, 9).contiguous()
    return (80 * masks)[..., None].repeat(1, 1, 1, 3).to(torch.uint8), masks


def turned(images, targets):
    """A user's function on images and targets."""
    return images.rot90(2, (2, 3)), targets.rot90(2, (1, 2))


@pytest.mark.parametrize("augment", ["flip", "crop_flip", TRANSFORMS, turned])
def test_masks_are_augmented_with_their_images(augment):
    draw = torch.Generator().manual_seed(3)
    pixels, masks = stripes_and_masks()
    after, moved = augmented(pixels.clone(), masks, resolve(augment), draw)
    assert moved.shape == masks.shape
    assert moved.dtype == torch.int64
    assert not torch.equal(moved, masks)
    assert torch.equal(after[..., 0], (80 * moved).to(torch.uint8))


def boxes_and_images(batch: int = 32) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Black images (B, 20, 30, 3), each with a bright rectangle and the box around it."""
    pixels = torch.zeros(batch, 20, 30, 3, dtype=torch.uint8)
    targets = []
    for number in range(batch):
        left, top = number % 16, number % 9
        pixels[number, top : top + 8, left : left + 10] = 255
        targets.append({"boxes": torch.tensor([[left, top, left + 10.0, top + 8]]), "labels": torch.tensor([1])})
    return pixels, targets


CROPPED = ["RandomHorizontalFlip", {"RandomCrop": {"size": [20, 30], "padding": 6}}]


@pytest.mark.parametrize("augment", ["flip", CROPPED])
def test_boxes_are_augmented_with_their_images(augment):
    pixels, targets = boxes_and_images()
    after, moved = augmented(pixels, targets, resolve(augment), torch.Generator().manual_seed(3))
    assert not all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(moved, targets, strict=True))
    for image, target in zip(after, moved, strict=True):
        rows, columns = image[..., 0].any(1).nonzero().flatten(), image[..., 0].any(0).nonzero().flatten()
        seen = [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]
        assert target["boxes"].tolist() == seen
        assert type(target["boxes"]) is torch.Tensor


def test_boxes_that_leave_the_image_are_dropped():
    pixels, targets = boxes_and_images(4)
    shift = [{"RandomAffine": {"degrees": 0, "translate": [0.99, 0.99]}}]
    after, moved = augmented(pixels, targets, resolve(shift), torch.Generator().manual_seed(0))
    counts = [len(target["boxes"]) for target in moved]
    assert counts == [len(target["labels"]) for target in moved]
    assert 0 in counts
    assert counts == [int(image.any()) for image in after]


def test_targets_that_are_values_are_not_changed():
    pixels, _ = stripes_and_masks(4)
    for augment in ("crop_flip", TRANSFORMS):
        values = torch.rand(4, 2)
        assert augmented(pixels.clone(), values, resolve(augment), torch.Generator())[1] is values


def test_crop_flip_raises_for_boxes():
    with pytest.raises(InputError, match=r"crop_flip, which pads images by reflection, .* objects without boxes"):
        augmented(*boxes_and_images(2), "crop_flip", torch.Generator())


def test_a_function_must_return_masks_too():
    with pytest.raises(InputError, match=r"returned an object of type Tensor. Return images and targets"):
        augmented(*stripes_and_masks(2), lambda images, _: images, torch.Generator())


def test_an_exception_in_a_users_function_is_reported_with_file_and_line():
    def broken(images):
        return images / None

    with pytest.raises(InputError, match=rf"the augmentation broken failed in {__file__}, line \d+ .return images"):
        augmented(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), None, broken, torch.Generator())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_images_and_other_channel_counts_are_augmented(channels):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 2**16, (64, 8, 9, channels), generator=draw).to(torch.uint16)
    for augment in ("crop_flip", ["RandomHorizontalFlip"], ["GaussianNoise"]):
        after, _ = augmented(pixels.clone(), None, resolve(augment), draw)
        assert after.dtype == torch.uint16
        assert after.shape == pixels.shape
        assert not torch.equal(after, pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_transforms_keep_16_bit_values(channels):
    pixels = torch.arange(2**16).to(torch.uint16).view(4, 128, 128, 1).expand(-1, -1, -1, channels).contiguous()
    flip = [{"RandomHorizontalFlip": {"p": 1}}]
    masks = torch.arange(128).expand(4, 128, 128)
    after, moved = augmented(pixels, masks, resolve(flip), torch.Generator())
    assert torch.equal(after.int(), pixels.int().flip(2))
    assert torch.equal(moved, masks.flip(2))


def test_descriptions_of_augmentations():
    assert described("none") == "none"
    assert described("flip") == "flip (half of the images are mirrored)"
    assert described("mine.py:change") == "mine.py:change"
    assert described([{"RandomCrop": {"size": 32}}, "RandomHorizontalFlip"]) == "RandomCrop, RandomHorizontalFlip"
    assert described(described) == "described"
