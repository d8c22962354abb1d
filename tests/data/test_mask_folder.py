import numpy as np
import pytest
import torch
from PIL import Image

from tersor.core.errors import InputError
from tersor.data import Batches, load, loading


@pytest.fixture
def masks(tmp_path):
    """`train` and `test` with 6 and 3 images and masks of 8x6 pixels; pixel (y, x) of the red channel is its class."""
    random = np.random.default_rng(0)
    for place, count in (("train", 6), ("test", 3)):
        for name in ("images", "masks"):
            (tmp_path / place / name).mkdir(parents=True)
        for number in range(count):
            classes = random.integers(0, 3, (6, 8), dtype=np.uint8)
            pixels = np.stack([classes, *random.integers(0, 256, (2, 6, 8), dtype=np.uint8)], 2)
            Image.fromarray(pixels).save(tmp_path / place / "images" / f"{number}.png")
            palette = Image.fromarray(classes).convert("P")
            palette.putdata(classes.flatten().tolist())
            palette.putpalette(random.integers(0, 256, 768).tolist())
            palette.save(tmp_path / place / "masks" / f"{number}.png")
    return tmp_path


def test_masks_are_loaded_and_augmented_with_their_images(masks, monkeypatch):
    for memory in (2**31, 0):  # in memory, and decoded on demand
        monkeypatch.setattr(loading, "MEMORY", memory)
        splits = load(folder=masks, validation=0.2, mean=(0, 0, 0), std=(1, 1, 1))
        assert (len(splits.train), len(splits.validation), len(splits.test)) == (5, 1, 3)
        assert splits.classes == ("0", "1", "2")
        batches = Batches(splits.train, 5, mean=splits.mean, std=splits.std, shuffle=True, augment="crop_flip")
        [batch] = batches
        assert batch.targets.dtype == torch.int64
        assert torch.equal((255 * batch.images[:, 0]).round().long(), batch.targets)


def test_images_and_masks_are_resized_without_cropping(masks):
    splits = load(folder=masks, image_size=[3, 4])
    assert splits.train.size == (3, 4)
    batch = splits.test.targets_at(torch.arange(3))
    whole = load(folder=masks).test.targets_at(torch.arange(3))
    rows, columns = np.arange(3) * 2 + 1, np.arange(4) * 2 + 1  # the pixels at the centres
    assert torch.equal(batch, whole[:, rows][:, :, columns])


def test_a_folder_without_train_and_test_is_split(masks):
    assert len(load(folder=masks / "train", validation=0).test) == 1


def test_class_names_are_read_from_a_file(masks):
    (masks / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    assert load(folder=masks).classes == ("sky", "road", "tree", "car")


def test_ignored_pixels_are_not_a_class(masks):
    Image.fromarray(np.full((6, 8), 255, np.uint8)).save(masks / "test" / "masks" / "0.png")
    splits = load(folder=masks)
    assert len(splits.classes) == 3
    assert splits.test.targets_at(torch.tensor([0])).unique().tolist() == [255]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "train/masks/3.png").unlink(), r"3\.png' has no mask. Add '.*masks.3\.png'"),
        (
            lambda folder: [path.unlink() for path in (folder / "test/masks").iterdir()],
            "and 2 other images have no mask",
        ),
        (
            lambda folder: [path.unlink() for path in (folder / "test/images").iterdir()],
            "there is no image in '.*images'",
        ),
        (
            lambda folder: Image.new("L", (8, 7)).save(folder / "train/masks/3.png"),
            r"mask '.*3\.png' has 8x7 pixels, and its image 8x6",
        ),
        (
            lambda folder: (folder / "classes.txt").write_text("sky\nroad"),
            "class index 2, and there are 2 classes. Possible: 0 to 1, and 255",
        ),
        (lambda folder: (folder / "classes.txt").write_text("sky"), r"classes\.txt' names 1 class\."),
        (lambda folder: Image.new("RGB", (8, 6)).save(folder / "train/masks/3.png"), "Pillow mode 'RGB'"),
        (lambda folder: (folder / "test/masks").rename(folder / "test/mask"), "holds no 'masks'"),
        (lambda folder: (folder / "test").rename(folder / "tset"), "neither 'test' nor 'val'"),
    ],
)
def test_invalid_masks_raise(masks, spoil, words):
    spoil(masks)
    with pytest.raises(InputError, match=words):
        load(folder=masks)


def test_a_mask_without_an_image_raises(masks):
    (masks / "train" / "images" / "2.png").unlink()
    with pytest.raises(InputError, match=r"masks/2\.png' has no image"):
        load(folder=masks)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 100, 200), "use only the class indices 0, 100, 200, so the number of classes is unclear"),
        ((0, 255), "use only the class index 0, so"),
        ((255,), "use no class index, so"),
    ],
)
def test_masks_that_use_gray_levels_for_classes_raise(masks, numbers, message):
    for place, count in (("train", 6), ("test", 3)):
        for number in range(count):
            gray = np.resize(np.array(numbers, np.uint8), (6, 8))
            Image.fromarray(gray).save(masks / place / "masks" / f"{number}.png")
    with pytest.raises(InputError, match=message):
        load(folder=masks)
