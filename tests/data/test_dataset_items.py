from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from tersor.core.errors import InputError
from tersor.data import Batches, load
from tersor.data.dataset_items import ItemSet
from tersor.data.decoding import ImageFormat

IMAGE = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
MASK = torch.arange(24).view(4, 6) % 3


def loaded(*items, **options):
    return load(datasets={"train": [*items] * 2, "test": [*items]}, validation=0, **options)


def targets_of(*items, **options):
    test = loaded(*items, **options).test
    return test.targets_at(torch.arange(len(items)))


def test_pairs_and_dicts_are_equivalent():
    for items in ([(IMAGE, 1), (IMAGE, 0)], [{"image": IMAGE, "label": 1}, {"image": IMAGE, "label": 0}]):
        assert targets_of(*items).tolist() == [1, 0]


def test_values():
    assert targets_of((IMAGE, 0.5), (IMAGE, 2.0)).tolist() == [[0.5], [2.0]]
    assert targets_of((IMAGE, [1, 0]), (IMAGE, [0, 1])).tolist() == [[1, 0], [0, 1]]
    splits = loaded((IMAGE, torch.tensor([1.0, 2.0])), (IMAGE, np.array([3.0, 4.0])))
    assert splits.classes == ("0", "1")
    assert splits.train.targets.dtype == torch.float32


@pytest.mark.parametrize(
    "mask", [MASK, MASK[None], MASK.numpy(), Image.fromarray(MASK.numpy().astype(np.uint8)), tv_tensors.Mask(MASK)]
)
def test_masks(mask):
    splits = loaded((IMAGE, mask), {"image": IMAGE, "annotation": mask})
    assert splits.classes == ("0", "1", "2")
    assert torch.equal(splits.test.targets_at(torch.arange(2)), MASK.expand(2, 4, 6))
    assert loaded((IMAGE, mask), (IMAGE, mask), image_size=[2, 3]).test.targets_at(torch.tensor([0])).shape == (1, 2, 3)


BOXES = [[1.0, 0.0, 3.0, 4.0]]


@pytest.mark.parametrize(
    "item",
    [
        (IMAGE, {"boxes": torch.tensor(BOXES), "labels": torch.tensor([2])}),
        {"image": IMAGE, "boxes": BOXES, "labels": [2]},
        {
            "image_id": 3,
            "image": Image.new("RGB", (6, 4)),
            "width": 6,
            "objects": {"id": [9], "bbox": [[1.0, 0.0, 2.0, 4.0]], "category": [1]},
        },
        (
            IMAGE,
            {
                "boxes": tv_tensors.BoundingBoxes([[2.0, 2.0, 2.0, 4.0]], format="CXCYWH", canvas_size=(4, 6)),
                "labels": torch.tensor([2]),
            },
        ),
    ],
)
def test_boxes_are_read(item):
    splits = loaded(item)
    [target] = splits.test.targets_at(torch.tensor([0]))
    assert target["boxes"].tolist() == BOXES
    assert target["labels"].tolist() == [2]
    assert len(splits.classes) == 3
    [batch] = Batches(splits.test, 1, mean=splits.mean, std=splits.std)
    assert batch.targets[0]["boxes"].tolist() == BOXES
    assert targets_of(item, image_size=[8, 6])[0]["boxes"].tolist() == [[1.0, 0.0, 3.0, 8.0]]


def test_validation_set_and_class_names_are_read():
    class Set(list):
        classes = ("cat", "dog")

    pairs = Set([(IMAGE, 1), (IMAGE, 0)])
    splits = load(datasets={"train": pairs, "validation": pairs, "test": pairs})
    assert splits.classes == ("cat", "dog")
    assert len(splits.validation) == 2
    boxed = Set([(IMAGE, {"boxes": BOXES, "labels": [2]})] * 2)
    assert load(datasets={"train": boxed, "test": boxed}, validation=0).classes == ("background", "cat", "dog")


@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.uint8), (5, torch.uint8), (3, torch.uint16)])
def test_images_can_have_any_number_of_channels(channels, dtype):
    image = torch.arange(channels * 24).view(channels, 4, 6).to(dtype)
    if dtype == torch.uint16:
        image = (image.int() * 500).to(dtype)
    splits = loaded((image, 0), (image, 1), channels=channels)
    assert torch.equal(splits.test.take(torch.tensor([0]))[0], image)
    assert len(splits.mean) == channels
    values = image.double() / torch.iinfo(dtype).max
    assert np.allclose(splits.mean, values.mean((1, 2)))
    assert np.allclose(splits.std, values.std((1, 2), correction=0))


@pytest.mark.parametrize(
    ("items", "options", "words"),
    [
        ([(IMAGE, "cat")], {}, "target of item 0 is a str. Possible: a pair"),
        ([{"image": IMAGE}], {}, "a dict with the keys 'image', and it is unclear which are the image and the target"),
        ([{"x": IMAGE, "label": 0}], {}, "a dict with the keys 'x', 'label', and"),
        ([{"image": IMAGE, "fine": 0, "coarse": 1}], {}, "it is unclear which are the image and the target"),
        ([(IMAGE, 0.5), (IMAGE, "cat")], {}, "target of item 1 is not a number"),
        (
            [(IMAGE, 0.5), (IMAGE, [1.0, 2.0])],
            {},
            r"item 1 has the values \[1.0, 2.0\]. Possible: finite numbers, as many",
        ),
        ([(IMAGE, float("nan"))], {}, "finite numbers"),
        ([(IMAGE, MASK[1:])], {}, r"mask 0 has the shape \(3, 6\), and its image \(4, 6\)"),
        ([(IMAGE, MASK.float())], {}, "a mask .* of float32"),
        ([(IMAGE, {"boxes": BOXES})], {}, "a dict of 'boxes'. Possible: boxes .* and labels"),
        ([(IMAGE, {"boxes": [[0, 0, 9, 9]], "labels": [1]})], {}, "item 0 has the box 0, 0, 9, 9, which is outside"),
        ([(IMAGE, {"boxes": BOXES, "labels": [1]}), (IMAGE, 3)], {}, "item 1 has a int instead of boxes"),
        ([(IMAGE, 0), (IMAGE, 1)], {"channels": 1}, "3 channels, but channels is 1. Write channels: 3"),
        ([(IMAGE, 0), (IMAGE.to(torch.uint16), 1)], {}, "some images have 8 and others 16 bits"),
    ],
)
def test_invalid_items_raise(items, options, words):
    with pytest.raises(InputError, match=words):
        loaded(*items, **options)


@pytest.mark.parametrize("target", [MASK, {"boxes": BOXES, "labels": [2]}])
def test_a_class_index_without_a_name_raises(target):
    class Set(list):
        classes = ("background", "cat")

    pairs = Set([(IMAGE, target)] * 2)
    with pytest.raises(InputError, match=r"class index 2, and there are 2 classes: background, cat. Possible: 0 to 1"):
        load(datasets={"train": pairs, "test": pairs}, validation=0)


def test_hugging_face_columns_and_class_names_are_read():
    class ClassLabel:
        names = ("cat", "dog")

    class Set(list):
        column_names, features, decoded = ["image", "label"], {"image": None, "label": ClassLabel()}, []

        def __getitem__(self, key):
            if key == "label":
                return [row["label"] for row in self]
            self.decoded.append(key)
            return super().__getitem__(key)

    rows = Set([{"image": IMAGE, "label": number % 2} for number in range(6)])
    item_set = ItemSet("it", rows)
    images = item_set.images("class", ImageFormat(), 1)
    assert images.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert rows.decoded == [0], "only the first image, for its size"
    assert load(datasets={"train": rows, "test": rows}, validation=0).classes == ("cat", "dog")
