import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tersor.core.errors import InputError
from tersor.data import Batches, load
from tersor.data.scenes import CLASSES, Scenes

DIGITS = load_digits()


def scenes(size=(64, 64), seed=0, digits=slice(0, 200)) -> Scenes:
    return Scenes(DIGITS.images[digits] / 16, DIGITS.target[digits], size, seed)


def test_a_scene_depends_on_its_number_and_the_seed_only():
    one, other = scenes(), scenes()
    first = one[3]
    assert np.array_equal(first.pixels, other[3].pixels)
    assert np.array_equal(first.boxes, other[3].boxes)
    assert not np.array_equal(first.pixels, one[4].pixels)
    assert not np.array_equal(first.pixels, scenes(seed=1)[3].pixels)


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (32, 33)])
def test_boxes_enclose_the_digits_of_the_mask(size):
    of = scenes(size)
    for number in range(40):
        scene = of[number]
        assert scene.pixels.shape == (*size, 3)
        assert scene.mask.shape == size
        assert 1 <= len(scene.boxes) == len(scene.labels) <= 5
        assert {*np.unique(scene.mask)} - {0} <= {*scene.labels}
        covered = np.zeros(size, bool)
        for (left, top, right, bottom), label in zip(scene.boxes.astype(int), scene.labels, strict=True):
            assert 0 <= left < right <= size[1]
            assert 0 <= top < bottom <= size[0]
            assert (scene.mask[top:bottom, left:right] == label).mean() > 0.1
            covered[top:bottom, left:right] = True
        assert not scene.mask[~covered].any()


def test_digits_overlap_by_at_most_15_percent():
    of = scenes()
    boxes = [of[number].boxes for number in range(100)]
    shares = []
    for each in boxes:
        for place, one in enumerate(each):
            for other in each[:place]:
                width, height = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
                smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
                shares.append(max(width, 0) * max(height, 0) / smaller)
    assert 0 < max(shares) <= 0.15 + 1e-6


def test_digits_have_contrast_with_the_background():
    of = scenes()
    contrasts = []
    for number in range(40):
        gray = of[number].pixels.mean(2)
        for (left, top, right, bottom), label in zip(of[number].boxes.astype(int), of[number].labels, strict=True):
            inside = of[number].mask[top:bottom, left:right]
            window = gray[top:bottom, left:right]
            contrasts.append(abs(window[inside == label].mean() - window[inside == 0].mean()))
    assert np.median(contrasts) > 30


def test_scenes_are_the_same_as_in_earlier_versions():
    """Published numbers were measured on these scenes: boxes, labels, mean and standard deviation of the colors."""
    of = scenes((40, 56), seed=5)
    expected = [
        ([[33, 5, 41, 19], [15, 23, 25, 40]], [1, 3], [123.18, 106.63, 57.5], [23.48, 25.74, 32.13]),
        ([[9, 1, 14, 10], [4, 6, 10, 16]], [8, 2], [148.87, 132.75, 97.41], [23.46, 34.01, 32.84]),
        ([[26, 15, 34, 31], [20, 21, 25, 30]], [3, 4], [138.07, 122.87, 60.72], [16.39, 30.18, 29.92]),
    ]
    for number, (boxes, labels, mean, deviation) in enumerate(expected):
        scene = of[number]
        assert (scene.boxes.tolist(), scene.labels.tolist()) == (boxes, labels)
        colours = scene.pixels.reshape(-1, 3)
        assert colours.mean(0) == pytest.approx(mean, abs=0.05)
        assert colours.std(0) == pytest.approx(deviation, abs=0.05)
    assert np.bincount(of[1].mask.ravel()).tolist() == [2184, 0, 27, 0, 0, 0, 0, 0, 29]


def test_load_returns_masks_or_boxes_of_the_same_scenes(monkeypatch):
    monkeypatch.setattr("tersor.data.datasets.TEST", 20)
    masks, boxes = (load(name="scenes", targets=targets, limit=6, validation=0.01) for targets in ("masks", "boxes"))
    assert (len(masks.train), len(masks.validation), len(masks.test)) == (6, 20, 20)
    assert masks.classes == boxes.classes == CLASSES
    index = torch.arange(6)
    assert torch.equal(masks.train.take(index), boxes.train.take(index))
    [batch] = Batches(masks.train, 6, mean=masks.mean, std=masks.std)
    assert batch.targets.dtype == torch.int64
    for mask, target in zip(batch.targets, boxes.train.targets_at(index), strict=True):
        assert {*mask.unique().tolist()} - {0} <= {*target["labels"].tolist()}
        left, top, right, bottom = target["boxes"][-1].int().tolist()  # the last one covers others
        assert (mask[top:bottom, left:right] == target["labels"][-1]).any()


def test_training_and_test_scenes_use_different_digits(monkeypatch):
    shown = {}

    class Recorded(Scenes):
        def __init__(self, digits, labels, size, seed):
            shown[len(shown)] = {digit.tobytes() for digit in digits}
            super().__init__(digits, labels, size, seed)

    monkeypatch.setattr("tersor.data.datasets.Scenes", Recorded)
    monkeypatch.setattr("tersor.data.datasets.TEST", 1)
    load(name="scenes", limit=2, validation=0)
    one, other = shown.values()
    assert one
    assert other
    assert not one & other


@pytest.mark.parametrize(
    ("options", "words"),
    [({"image_size": 20}, "image_size is 20. Write at least 32"), ({"root": "."}, "scenes are made from scikit-learn")],
)
def test_invalid_options_for_scenes_raise(options, words):
    with pytest.raises(InputError, match=words):
        load(name="scenes", **options)
