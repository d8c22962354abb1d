import json

import pytest
import torch
from PIL import Image

from tersor.core.errors import InputError
from tersor.data import load


def content(images, annotations):
    return {
        "info": {},
        "categories": [{"id": 7, "name": "dog", "supercategory": "animal"}, {"id": 3, "name": "cat"}],
        "images": [{"id": identity, "file_name": name, "width": 0} for identity, name in images],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd, "segmentation": []}
            for image, category, box, crowd in annotations
        ],
    }


TRAIN = content(
    [(5, "a.png"), (6, "b.png")],
    [(6, 7, [2, 1, 3, 4], 0), (6, 3, [0, 0, 20, 10], 0), (6, 3, [0, 0, 9, 9], 1), (5, 7, [4, 4, 0, 2], 0)],
)
TEST = content([(1, "a.png")], [(1, 3, [0.5, 0.5, 2, 2], 0)])


@pytest.fixture(params=["annotations", "beside"])
def coco(request, tmp_path):
    """A function that writes the files, in the COCO layout or next to the images, and returns the folder."""

    def write(train=TRAIN, test=TEST):
        for which, each in (("train", train), ("val", test)):
            folder = tmp_path / (f"{which}2017" if request.param == "annotations" else which)
            folder.mkdir()
            for name in ("a.png", "b.png"):
                Image.new("RGB", (20, 10)).save(folder / name)
            place = tmp_path / "annotations" / f"instances_{which}2017.json"
            if request.param == "beside":
                place = folder / "_annotations.coco.json"
            place.parent.mkdir(exist_ok=True)
            place.write_text(each if isinstance(each, str) else json.dumps(each))
        return tmp_path

    return write


def test_boxes_and_classes_are_read(coco):
    splits = load(folder=coco(), validation=0)
    assert splits.classes == ("background", "cat", "dog")
    first, second = splits.train.targets_at(torch.arange(2))
    assert first["boxes"].shape == (0, 4), "a box without area"
    assert second["boxes"].tolist() == [[2, 1, 5, 5], [0, 0, 20, 10]]
    assert second["labels"].tolist() == [2, 1]
    assert splits.test.targets_at(torch.tensor([0]))[0]["boxes"].tolist() == [[0.5, 0.5, 2.5, 2.5]]


def changed(**changes):
    return TRAIN | changes


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("[", "is not a JSON file"),
        ("[]", "is not a COCO file of boxes"),
        (changed(images=[]), "images: List should have at least 1 item"),
        (changed(annotations=[{"image_id": 5, "category_id": 3, "bbox": [1]}]), "annotations.0.bbox"),
        (changed(images=[{"id": 5, "file_name": "z.png"}]), r"the image 'z\.png' .* is in none of"),
        (
            content([(5, "a.png")], [(8, 3, [0, 0, 1, 1], 0)]),
            "image_id 8, which is not among its images. Remove the annotation",
        ),
        (
            content([(5, "a.png")], [(5, 4, [0, 0, 1, 1], 0)]),
            "category_id 4, which is not among its categories. Remove the annotation",
        ),
        (content([(5, "a.png"), (6, "b.png")], [(6, 3, [0, 0, 30, 1], 0)]), r"b\.png has the box .* outside"),
        (content([(5, "a.png")], [(5, 3, [9, 9, -4, 2], 0)]), r"a\.png has a box of -4x2 pixels"),
        (changed(categories=[{"id": 3, "name": "cow"}]), "different categories"),
    ],
)
def test_invalid_files_raise(coco, train, words):
    with pytest.raises(InputError, match=words):
        load(folder=coco(train), validation=0)


def test_a_missing_test_set_raises(coco):
    folder = coco()
    for path in [*folder.glob("val*/*.json"), *folder.glob("annotations/*val*")]:
        path.unlink()
    with pytest.raises(InputError, match="no COCO file of the test set"):
        load(folder=folder)
