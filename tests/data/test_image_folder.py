from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tersor.core.errors import InputError
from tersor.data import Batches, load
from tersor.data.decoding import ImageFormat
from tersor.data.image_folder import from_folder

SHARED = Path(__file__).parents[2] / "../shared/data/cifar10-jpeg.tar.gz"


def everything(images) -> torch.Tensor:
    return images.take(torch.arange(len(images)))


def test_train_and_test(two_classes):
    splits = from_folder(two_classes, ImageFormat())
    assert splits.classes == ("cat", "dog")
    assert splits.train.targets.tolist() == [0] * 8 + [1] * 8
    assert splits.test.targets.tolist() == [0] * 2 + [1] * 2
    assert len(splits.validation) == 0
    assert splits.train.size == (4, 6)
    pixels = everything(splits.test)
    for place, path in enumerate(sorted((two_classes / "test").glob("*/*"))):
        assert np.array_equal(pixels[place].permute(1, 2, 0), np.asarray(Image.open(path)))


def test_val_is_the_test_set_if_there_is_no_other(two_classes):
    (two_classes / "test").rename(two_classes / "val")
    splits = from_folder(two_classes, ImageFormat())
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 0, 4)


def test_val_next_to_test_is_the_validation_set(two_classes, draw_images):
    draw_images("val/dog", 3)
    splits = from_folder(two_classes, ImageFormat())
    assert splits.validation.targets.tolist() == [1, 1, 1]
    assert len(splits.test) == 4


@pytest.mark.parametrize("name", ["valid", "Validation", "VAL"])
def test_alternative_names_of_set_folders_are_recognized(two_classes, draw_images, name):
    (two_classes / "train").rename(two_classes / "Train")
    (two_classes / "test").rename(two_classes / "Testing")
    draw_images(f"{name}/dog", 3)
    splits = from_folder(two_classes, ImageFormat())
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 3, 4)


def test_two_folders_for_the_same_set_raise(two_classes, draw_images):
    draw_images("val/dog", 3)
    draw_images("valid/dog", 3)
    with pytest.raises(InputError, match="holds 'val' and 'valid', which are names of the same set"):
        from_folder(two_classes, ImageFormat())


def test_a_folder_train_that_contains_images_is_a_class_in_any_case(draw_images):
    for name in ("Bus", "Car", "Train"):
        folder = draw_images(name, 10)
    assert from_folder(folder, ImageFormat()).classes == ("Bus", "Car", "Train")


def test_a_link_to_a_parent_folder_does_not_repeat_images(draw_images):
    draw_images("cat/near", 10)
    folder = draw_images("dog", 10)
    (folder / "cat" / "near" / "back").symlink_to(folder / "cat", target_is_directory=True)
    (folder / "cat" / "again").symlink_to(folder / "cat" / "near", target_is_directory=True)
    splits = from_folder(folder, ImageFormat())
    assert len(splits.train) + len(splits.test) == 20


def test_class_folders_alone_get_a_test_set(draw_images):
    draw_images("cat", 20)
    draw_images("dog", 10)
    folder = draw_images("emu", 2)
    splits, again = from_folder(folder, ImageFormat()), from_folder(folder, ImageFormat())
    assert torch.bincount(splits.test.targets).tolist() == [3, 2, 1]
    assert torch.bincount(splits.train.targets).tolist() == [17, 8, 1]
    assert torch.equal(everything(splits.test), everything(again.test))
    whole = torch.cat([everything(splits.train), everything(splits.test)])
    assert len(whole.flatten(1).unique(dim=0)) == 32


def test_a_folder_train_next_to_other_classes_is_a_class(draw_images):
    draw_images("bus", 5)
    assert from_folder(draw_images("train", 5), ImageFormat()).classes == ("bus", "train")


def test_nested_images_are_found_and_hidden_and_other_files_are_ignored(draw_images):
    draw_images("cat/images/old", 3, suffix=".JPEG")
    draw_images("cat", 3)
    folder = draw_images("dog", 4)
    (folder / "dog" / "._000.png").write_bytes(b"of another file system")
    (folder / "dog" / "notes.txt").write_text("good dogs")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "LICENSE").write_text("do what you like")
    splits = from_folder(folder, ImageFormat())
    assert splits.classes == ("cat", "dog")
    assert len(splits.train) + len(splits.test) == 10


def test_image_size_resizes_images_of_different_sizes(draw_images):
    draw_images("cat", 3, size=(9, 5))
    folder = draw_images("dog", 3, size=(6, 8))
    assert everything(from_folder(folder, ImageFormat((4, 4))).train).shape[1:] == (3, 4, 4)
    with pytest.raises(InputError, match=r"differ in size: 9x5 and 6x8 .*Resize them: write data\.image_size"):
        everything(from_folder(folder, ImageFormat()).train)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_among_the_images_does_not_hang(two_classes):
    os.mkfifo(two_classes / "train" / "dog" / "pipe.png")
    with pytest.raises(InputError, match=r"dog.pipe\.png'.*not a regular file"):
        everything(from_folder(two_classes, ImageFormat()).train)


def test_a_truncated_image_is_named_in_the_error(two_classes):
    path = two_classes / "train" / "dog" / "003.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"dog.003\.png' cannot be decoded"):
        everything(from_folder(two_classes, ImageFormat()).train)


def _remove(*places):
    def spoil(folder):
        for place in places:
            shutil.rmtree(folder / place)

    return spoil


def _empty(*places):
    def spoil(folder):
        for place in places:
            shutil.rmtree(folder / place, ignore_errors=True)
            (folder / place).mkdir(parents=True)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_remove("train"), "holds test, but no 'train'"),
        (_remove("test"), "neither 'test' nor 'val'"),
        (_remove("train", "test"), "no class folders"),
        (_empty("train"), "train' holds no class folders"),
        (_empty("test"), "test' holds no class folders"),
        (_empty("train/cat"), r"class folder '.*cat' contains no images\."),
        (_empty("test/dog"), r"class folder '.*test.dog' contains no images"),
        (_empty("train/dog", "train/cat", "train/emu"), r"cat' and 2 others \(dog, emu\) contain no images\."),
        (_remove("test/cat"), "lacks 1 of the 2 classes: cat"),
        (_remove("train/cat"), "classes that 'train' lacks: cat. Possible: dog"),
    ],
)
def test_invalid_folders_raise(two_classes, spoil, words):
    spoil(two_classes)
    with pytest.raises(InputError, match=words):
        from_folder(two_classes, ImageFormat())


def test_a_class_with_a_single_image_raises(draw_images):
    draw_images("cat", 4)
    with pytest.raises(InputError, match="the class dog has a single image"):
        from_folder(draw_images("dog", 1), ImageFormat())


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/cifar10-jpeg.tar.gz beside the checkout")
def test_real_photographs_are_loaded(tmp_path):
    with tarfile.open(SHARED, "r|gz") as archive:
        members = (member for member in archive if member.isdir() or member.name.endswith("00.jpg"))
        archive.extractall(tmp_path, members, filter="data")
    splits = from_folder(tmp_path / "cifar10-jpeg", ImageFormat())
    assert splits.classes[:3] == ("airplane", "automobile", "bird")
    assert (len(splits.train), len(splits.test), splits.train.size) == (500, 100, (32, 32))
    photographs = everything(splits.train).float()
    neighbours = (photographs[..., 1:] - photographs[..., :-1]).abs().mean()
    assert 2 < neighbours < 25  # noise would differ by 85


def test_images_without_classes_have_no_targets_and_get_a_test_set(draw_images):
    folder = draw_images("", 10)
    splits = from_folder(folder, ImageFormat())
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 0, 2)
    assert splits.classes == ()
    assert splits.train.targets is None
    assert splits.test.targets_at(torch.arange(2)) is None
    whole = torch.cat([everything(splits.train), everything(splits.test)])
    assert len(whole.flatten(1).unique(dim=0)) == 10


def test_train_validation_and_test_folders_without_classes(draw_images):
    for name, count in (("train", 5), ("val", 2), ("test", 3)):
        folder = draw_images(name, count)
    splits = load(folder=folder)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (5, 2, 3)
    (batch,) = Batches(splits.test, 3, mean=splits.mean, std=splits.std)
    assert batch.targets is None
    assert batch.images.shape == (3, 3, 4, 6)


def test_classes_in_only_one_of_the_sets_raise(draw_images):
    draw_images("train", 5)
    with pytest.raises(InputError, match="train' holds no class folders"):
        from_folder(draw_images("test/cat", 3), ImageFormat())
