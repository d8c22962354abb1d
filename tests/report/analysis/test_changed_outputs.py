"""Masks and boxes are drawn into the image; the images with the least agreement are shown."""

from __future__ import annotations

import colorsys

import pytest
import torch

from evidence_page import undocumented
from tersor import tasks
from tersor.data.image_sets import Pixels
from tersor.report.analysis.changed_outputs import compare_outputs, with_boxes, with_mask
from tersor.report.analysis.predictions import rgb_of

GRAY = torch.full((3, 8, 8), 100, dtype=torch.uint8)


def test_a_mask_colors_its_classes_and_no_other_pixels():
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[0], mask[1], mask[2] = 1, 2, 255
    drawn = with_mask(GRAY, mask, ignore_index=255)
    changed = (drawn != GRAY).any(0)
    assert changed[:2].all()
    assert not changed[2:].any()
    assert (drawn[:, 0, 0] != drawn[:, 1, 0]).any(), "each class has its own colour"
    enlarged = with_mask(GRAY, mask[::2, ::2], ignore_index=255)
    assert (enlarged != GRAY).any(0)[:2].all()


def test_only_confident_boxes_are_drawn():
    boxes = torch.tensor([[1.0, 1.0, 6.0, 6.0], [0.0, 0.0, 8.0, 8.0]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.1])}
    scale = 160 // 8
    drawn = with_boxes(GRAY, found)
    assert drawn.shape == (3, 160, 160)
    changed = (drawn != 100).any(0)
    assert changed[1 * scale, 1 * scale : 6 * scale].all()
    assert not changed[0].any()
    assert not changed[4 * scale, 4 * scale]
    assert (with_boxes(GRAY, {"boxes": boxes[1:], "labels": torch.tensor([1])}) != 100).any(0)[0].all(), "a label"


def test_examples_are_sorted_by_agreement_and_show_their_values():
    images = Pixels(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), None)
    before = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    after = torch.tensor([[1.0], [1.0], [2.9], [4.0]])
    found = compare_outputs(tasks.build("regression"), images, (), before, before, after)
    assert [each["index"] for each in found["examples"]] == [1, 2]
    assert found["examples"][0]["values"] == {"original": "2", "artifact": "1", "label": "2"}
    assert not undocumented({"outputs": found}, "evidence.json of a run")
    assert found["classes"] == []


def test_class_scores_are_none_if_a_class_does_not_occur():
    images = Pixels(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), None)
    targets, before, after = (
        torch.tensor([values]).view(1, 2, 2) for values in ([0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1])
    )
    found = compare_outputs(tasks.build("segmentation"), images, ("a", "b", "c"), targets, before, after)
    assert not undocumented({"outputs": found}, "evidence.json of a run")
    assert [each["before"] for each in found["classes"]] == [100, 100, None]
    assert [each["after"] for each in found["classes"][:2]] == [50, 100 * 2 / 3]
    assert found["agreement"] == 75


def test_images_with_any_channels_and_bit_depth_are_converted_to_rgb():
    class Images:
        def __init__(self, pixels):
            self.pixels = pixels

        def take(self, index):
            return self.pixels[index]

    deep = torch.tensor([0x12FF, 0x3400], dtype=torch.int32).to(torch.uint16).view(2, 1, 1, 1)
    assert rgb_of(Images(deep), 0).flatten().tolist() == [0x12] * 3
    four = torch.arange(4, dtype=torch.uint8).view(1, 4, 1, 1)
    assert rgb_of(Images(four), 0).flatten().tolist() == [0, 1, 2]


def test_masks_are_blended_with_the_image_in_the_colors_of_their_classes():
    """Class n has a hue of n * 137.508 degrees and an opacity of 60 %."""
    mask = torch.zeros(8, 8, dtype=torch.int64)
    mask[0, 0], mask[0, 1], mask[0, 2] = 1, 2, 5
    drawn = with_mask(GRAY, mask, ignore_index=255)
    for place, number in enumerate((1, 2, 5)):
        colour = colorsys.hsv_to_rgb(number * 137.508 % 360 / 360, 0.9, 0.95)
        expected = [0.4 * 100 + 0.6 * 255 * each for each in colour]
        assert drawn[:, 0, place].tolist() == pytest.approx(expected, abs=1)
    wide = torch.full((3, 8, 12), 100, dtype=torch.uint8)
    assert (with_mask(wide, mask[:4, :4], 255) != wide).any(0).nonzero()[:, 1].max() == 8


def test_boxes_are_drawn_on_enlarged_images():
    wide = torch.full((3, 10, 40), 100, dtype=torch.uint8)
    box = {"boxes": torch.tensor([[10.0, 2.0, 30.0, 8.0]]), "labels": torch.tensor([3])}
    drawn = with_boxes(wide, box)
    assert drawn.shape == (3, 40, 160), "four times as large"
    colour = [round(255 * each) for each in colorsys.hsv_to_rgb(3 * 137.508 % 360 / 360, 0.9, 0.95)]
    assert drawn[:, 8, 80].tolist() == colour
    assert drawn[:, 20, 40].tolist() == colour
    rows, columns = ((drawn == torch.tensor(colour)[:, None, None]).all(0).any(side).nonzero() for side in (1, 0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 32, 40, 120)
    large = torch.full((3, 100, 200), 100, dtype=torch.uint8)
    assert with_boxes(large, box).shape == large.shape
    turned = {"boxes": torch.tensor([[30.0, 2.0, 10.0, 8.0]]), "labels": torch.tensor([3])}
    assert torch.equal(with_boxes(large, turned), large)
    half = box | {"scores": torch.tensor([0.5])}
    assert not torch.equal(with_boxes(large, half), large)


def test_detections_are_shown_as_pictures():
    images = Pixels(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), None)
    box = {"boxes": torch.tensor([[1.0, 1.0, 6.0, 6.0]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    none = {key: value[:0] for key, value in box.items()}
    found = compare_outputs(tasks.build("detection"), images, ("a", "b"), None, [box, box], [box, none])
    (example,) = found["examples"]
    assert (example["index"], example["agreement"], found["agreement"]) == (1, 0, 50)
    assert list(example["pictures"]) == ["original", "artifact"]
    assert example["pictures"]["original"] != example["pictures"]["artifact"]
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    other = masks.clone()
    other[0] = 1
    found = compare_outputs(tasks.build("segmentation"), images, ("a", "b"), masks, masks, other)
    (example,) = found["examples"]
    assert list(example["pictures"]) == ["original", "artifact", "label"]
    assert example["pictures"]["original"] == example["pictures"]["label"] != example["pictures"]["artifact"]


def test_values_of_any_outputs_are_shown_as_text():
    images = Pixels(torch.zeros(10, 8, 8, 3, dtype=torch.uint8), None)
    labels = torch.tensor([[True, False, True], [False, False, False]] * 5)
    found = compare_outputs(tasks.build("multilabel"), images, (), None, labels, ~labels)
    assert len(found["examples"]) == 8
    assert found["examples"][0]["values"] == {"original": "0, 2", "artifact": "1"}
    assert found["examples"][1]["values"] == {"original": "none", "artifact": "0, 1, 2"}
    values = torch.arange(20.0).view(2, 10)
    found = compare_outputs(tasks.build("embedding"), images, (), None, {"a": values}, {"a": values.flip(1)})
    assert found["examples"][0]["values"]["original"].startswith("{'a': tensor([")
    found = compare_outputs(tasks.build("regression"), images, (), None, values, values + 1)
    assert found["examples"][0]["values"]["original"] == "0, 1, 2, 3, 4, 5, 6, 7, ..."
    found = compare_outputs(tasks.build("regression"), images, (), None, values[:, :8], values[:, :8] + 1)
    assert found["examples"][0]["values"]["original"] == "0, 1, 2, 3, 4, 5, 6, 7"
