from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from PIL import Image

from tersor.core.errors import InputError
from tersor.data import Splits, load, loading
from tersor.data.image_sets import Pixels


def everything(images) -> torch.Tensor:
    return images.take(torch.arange(len(images)))


def test_the_docstring_runs():
    assert doctest.testmod(loading).failed == 0
    assert doctest.testmod(loading).attempted > 0


def test_validation_images_are_taken_from_the_training_images():
    whole, cut = load(name="digits", validation=0), load(name="digits", validation=0.25)
    assert len(whole.validation) == 0
    assert len(cut.validation) == round(0.25 * len(whole.train))
    shares = torch.bincount(cut.validation.targets) / torch.bincount(whole.train.targets)
    assert (shares - 0.25).abs().max() < 0.01
    together = torch.cat([everything(cut.train), everything(cut.validation)])
    assert torch.equal(
        together.flatten(1).unique(dim=0, return_counts=True)[1],
        everything(whole.train).flatten(1).unique(dim=0, return_counts=True)[1],
    )


def test_the_seed_changes_validation_but_not_test_images():
    one, other = load(name="digits", seed=1), load(name="digits", seed=2)
    assert torch.equal(everything(one.test), everything(other.test))
    assert not torch.equal(everything(one.validation), everything(other.validation))
    assert torch.equal(everything(one.train), everything(load(name="digits", seed=1).train))


def test_limit_keeps_every_class_and_all_validation_images():
    few, all_of_them = load(name="digits", limit=50), load(name="digits")
    assert torch.bincount(few.train.targets).tolist() == [5] * 10
    assert torch.equal(everything(few.validation), everything(all_of_them.validation))
    assert len(load(name="digits", limit=10).train.targets.unique()) == 10


def test_a_large_set_is_decoded_on_demand_to_the_same_images(two_classes, monkeypatch):
    held = load(folder=two_classes)
    monkeypatch.setattr(loading, "MEMORY", 0)
    lazy = load(folder=two_classes)
    assert isinstance(held.train, Pixels)
    assert not isinstance(lazy.train, Pixels)
    for one, other in ((held.train, lazy.train), (held.validation, lazy.validation), (held.test, lazy.test)):
        assert torch.equal(everything(one), everything(other))
        assert torch.equal(one.targets, other.targets)
    assert (held.mean, held.std) == (lazy.mean, lazy.std)


def test_mean_and_std_are_computed_from_the_training_images(two_classes):
    splits = load(folder=two_classes)
    values = everything(splits.train).double() / 255
    assert np.allclose(splits.mean, values.mean((0, 2, 3)))
    assert np.allclose(splits.std, values.std((0, 2, 3), correction=0))


def test_mean_and_std_of_a_sample_are_deterministic_and_close_to_those_of_all_images(monkeypatch):
    monkeypatch.setattr(loading, "STATISTICS_OF", 300)
    sample, again, whole = (load(name="digits", seed=seed, validation=0).mean for seed in (0, 0, 1))
    assert sample == again != whole
    assert np.allclose(sample, whole, atol=0.02)


def test_explicit_mean_and_std_are_used():
    splits = load(name="digits", mean=[0.1, 0.2, 0.3], std=(1, 2, 3))
    assert splits.mean == (0.1, 0.2, 0.3)
    assert splits.std == (1.0, 2.0, 3.0)


def test_a_constant_channel_has_std_1(tmp_path):
    for place in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "test/a/0", "test/b/0"):
        path = tmp_path / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), (51, 0, 255)).save(path)
    splits = load(folder=tmp_path)
    assert splits.mean == pytest.approx((0.2, 0, 1))
    assert splits.std == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "got none"),
        ({"name": "digits", "folder": "."}, "got folder and name"),
        ({"folder": ".", "root": "."}, "root is used only with name"),
        ({"name": "digits", "validation": 1}, "validation is 1"),
        ({"name": "digits", "validation": -0.1}, "validation is -0.1"),
        ({"name": "digits", "validation": float("nan")}, "validation is nan"),
        (
            {"name": "digits", "validation": 0.999},
            r"at most 1428 are possible.*a smaller validation \(0 for none",
        ),
        ({"name": "digits", "limit": 0}, "limit is 0"),
        ({"name": "digits", "limit": 9}, "limit is 9, but .*from 10 to 1294"),
        ({"name": "digits", "limit": 1295}, "limit is 1295, .*1294 training images"),
        ({"name": "digits", "image_size": 0}, "image_size is 0"),
        ({"name": "digits", "image_size": 8.5}, r"image_size is 8\.5"),
        ({"name": "digits", "image_size": "8"}, "image_size is '8'"),
        ({"name": "digits", "mean": (0, 0, 0)}, "belong together"),
        ({"name": "digits", "mean": (124, 117, 104), "std": (1, 1, 1)}, r"mean is .*in \[0, 1\]"),
        (
            {"name": "digits", "mean": (0.5,), "std": (1, 1, 1)},
            r"Write 3 numbers in .* For grayscale images, write channels: 1 or --channels 1\.",
        ),
        ({"name": "digits", "mean": (0.5, 0.5), "std": (1, 1)}, r"Write 3 numbers in"),
        ({"name": "digits", "mean": (0, 0, 0), "std": (1, 0, 1)}, "Write 3 numbers above 0"),
        ({"name": "digits", "mean": (0, 0, 0), "std": (1, float("nan"), 1)}, "Write 3 numbers above 0"),
    ],
)
def test_invalid_options_raise(options, words):
    with pytest.raises(InputError, match=words):
        load(**options)


def test_a_single_class_raises(draw_images):
    with pytest.raises(InputError, match=r"a single class \(cat\)"):
        load(folder=draw_images("cat", 4))


def test_a_single_image_raises(draw_images):
    with pytest.raises(InputError, match="the class cat has a single image"):
        load(folder=draw_images("cat", 1))


def test_too_few_images_for_validation_raise(draw_images):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        folder = draw_images(name, 1)
    with pytest.raises(InputError, match=r"1 of 2 training images, but at most 0 are possible.*write validation: 0"):
        load(folder=folder)
    assert len(load(folder=folder, validation=0).train) == 2


def test_the_error_for_a_limit_mentions_classes_only_if_there_are_classes():
    few = [(Image.new("RGB", (4, 4)), target) for target in (0, 1, 0, 1)]
    for kind, words in ((int, r"\) of 2 classes\. Write a number from 2 to 4"), (float, r"\)\. Write a number from 1")):
        images = [(image, kind(target)) for image, target in few]
        with pytest.raises(InputError, match=r"4 training images \(without validation images" + words):
            load(datasets={"train": images, "test": images}, validation=0, limit=9)


def test_test_images_of_a_different_size_raise(draw_images):
    for name in ("cat", "dog"):
        draw_images(f"train/{name}", 5, size=(8, 8))
        folder = draw_images(f"test/{name}", 5, size=(9, 7))
    with pytest.raises(
        InputError, match=r"training images have 8x8 pixels, test images 9x7\. Resize them: write data\.image_size"
    ):
        load(folder=folder)
    assert load(folder=folder, image_size=6).test.size == (6, 6)


@pytest.mark.parametrize(
    ("place", "words"), [("none", "does not exist"), ("images.tar.gz", "is a file. Unpack an archive; for a CSV")]
)
def test_an_invalid_folder_raises(tmp_path, place, words):
    (tmp_path / "images.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=words):
        load(folder=tmp_path / place)


def splits_of(**changes) -> Splits:
    some = Pixels(torch.zeros(6, 2, 2, 3, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0, 1]))
    return Splits(**({"train": some, "validation": some, "test": some, "classes": ("cat", "dog")} | changes))


def test_splits_of_a_function_keep_mean_std_and_validation_images(monkeypatch):
    made = splits_of(mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5))
    monkeypatch.setattr(loading, "from_name", lambda *_: made)
    assert load(name="a:b") == made
    assert load(name="a:b", mean=(0, 0, 0), std=(1, 1, 1)).std == (1, 1, 1)
    assert len(load(name="a:b", limit=4).train) == 4


def test_splits_of_a_function_are_checked(monkeypatch):
    monkeypatch.setattr(loading, "from_name", lambda *_: splits_of(classes=("cat", "dog")))
    with pytest.raises(InputError, match="images of 2x2 pixels, but image_size is 8"):
        load(name="a:b", image_size=8)
    for labels in ([0, 1, 2], [-1, 0, 1]):
        strange = Pixels(torch.zeros(3, 2, 2, 3, dtype=torch.uint8), torch.tensor(labels))
        monkeypatch.setattr(loading, "from_name", lambda *_, strange=strange: splits_of(test=strange))
        with pytest.raises(InputError, match=f"labels range from {labels[0]} to {labels[2]}, but there are 2 classes"):
            load(name="a:b")
