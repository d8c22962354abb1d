import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from tersor.core.errors import InputError
from tersor.data import load

SHARED = Path(__file__).parents[2] / "../shared/data/bccd.tar.gz"


def annotation(*objects):
    inside = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for name, box in objects
    )
    return f"<annotation><size><width>0</width></size>{inside}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Three training images and one test image of 20x10 pixels."""
    for place in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / place).mkdir(parents=True)
    objects = {
        "a": [("dog", (1, 1, 20, 10))],
        "b": [("cat", (3, 4, 5, 6)), ("dog", (11, 1, 20, 5))],
        "c": [],
        "d": [("cat", (1, 1, 1, 1))],
    }
    for name, each in objects.items():
        Image.new("RGB", (20, 10), (9, 99, 199)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(annotation(*each))
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb  1\nc\n")
    (tmp_path / "ImageSets/Main/test.txt").write_text("d\n")
    return tmp_path


def test_one_based_corners_are_converted_to_edges(voc):
    splits = load(folder=voc, validation=0)
    assert splits.classes == ("background", "cat", "dog")
    first, second, third = splits.train.targets_at(torch.arange(3))
    assert first["boxes"].tolist() == [[0, 0, 20, 10]]
    assert second["boxes"].tolist() == [[2, 3, 5, 6], [10, 0, 20, 5]]
    assert second["labels"].tolist() == [1, 2]
    assert third["boxes"].shape == (0, 4)
    assert splits.test.targets_at(torch.tensor([0]))[0]["boxes"].tolist() == [[0, 0, 1, 1]]


def test_boxes_are_resized_with_the_image(voc):
    splits = load(folder=voc, image_size=20, validation=0)
    assert splits.train.size == (20, 20)
    assert splits.train.targets_at(torch.tensor([1]))[0]["boxes"].tolist() == [[2, 6, 5, 12], [10, 0, 20, 10]]


@pytest.mark.parametrize(("train", "validation"), [("train", 1), ("trainval", 0)])
def test_lists_of_images_define_the_sets(voc, train, validation):
    (voc / "ImageSets/Main/train.txt").rename(voc / f"ImageSets/Main/{train}.txt")
    (voc / "ImageSets/Main/val.txt").write_text("d\n")
    assert len(load(folder=voc, validation=0).validation) == validation
    (voc / "ImageSets/Main/test.txt").unlink()
    splits = load(folder=voc, validation=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3, 0, 1)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("ImageSets/Main/train.txt", "\n", r"train\.txt' is empty"),
        ("ImageSets/Main/test.txt", None, r"holds no val\.txt"),
        ("Annotations/b.xml", None, r"annotation '.*b\.xml' does not exist"),
        ("JPEGImages/b.jpg", None, r"no image '.*b\.jpg' for '.*b\.xml'"),
        ("Annotations/b.xml", "<annotation>", r"b\.xml' is not an XML file"),
        ("Annotations/b.xml", "<annotation><object><name>cat</name></object></annotation>", "without xmin, ymin"),
        ("Annotations/b.xml", annotation(("", (1, 1, 2, 2))), "an object without a name"),
        ("Annotations/b.xml", annotation(("cat", (1, 1, 40, 2))), r"b\.xml' has the box 0, 0, 40, 2, which is outside"),
        ("Annotations/b.xml", annotation(("cat", (5, 5, 3, 6))), "has no area"),
        ("Annotations/d.xml", annotation(("cow", (1, 1, 2, 2))), "class 'cow', which no training image has"),
    ],
)
def test_invalid_annotations_raise(voc, file, text, words):
    if text is None:
        (voc / file).unlink()
    else:
        (voc / file).write_text(text)
    with pytest.raises(InputError, match=words):
        load(folder=voc, validation=0)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/bccd.tar.gz beside the checkout")
def test_the_blood_cell_dataset_is_loaded(tmp_path):
    with tarfile.open(SHARED) as archive:
        archive.extractall(tmp_path, filter="data")
    splits = load(folder=tmp_path / "bccd", image_size=[120, 160])
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (205, 87, 72)
    assert splits.classes == ("background", "Platelets", "RBC", "WBC")
    boxes = sum(
        len(target["boxes"]) for each in (splits.train, splits.validation, splits.test) for target in each.targets
    )
    assert boxes == 4155 + 372 + 361
