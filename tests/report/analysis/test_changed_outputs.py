"""Masks and boxes are drawn into the image; the images with the least agreement are shown."""

from __future__ import annotations

import torch

from tersor import tasks
from tersor.data.image_sets import Pixels
from tersor.report.analysis.changed_outputs import compare_outputs, with_boxes, with_mask
from tersor.report.analysis.predictions import rgb_of

GREY = torch.full((3, 8, 8), 100, dtype=torch.uint8)


def test_a_mask_colours_its_classes_only():
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[0], mask[1], mask[2] = 1, 2, 255
    drawn = with_mask(GREY, mask, ignore_index=255)
    changed = (drawn != GREY).any(0)
    assert changed[:2].all()
    assert not changed[2:].any()
    assert (drawn[:, 0, 0] != drawn[:, 1, 0]).any(), "each class has its own colour"
    enlarged = with_mask(GREY, mask[::2, ::2], ignore_index=255)
    assert (enlarged != GREY).any(0)[:2].all()


def test_confident_boxes_are_drawn():
    boxes = torch.tensor([[1.0, 1.0, 6.0, 6.0], [0.0, 0.0, 8.0, 8.0]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.1])}
    scale = 160 // 8
    drawn = with_boxes(GREY, found)
    assert drawn.shape == (3, 160, 160)
    changed = (drawn != 100).any(0)
    assert changed[1 * scale, 1 * scale : 6 * scale].all()
    assert not changed[0].any()
    assert not changed[4 * scale, 4 * scale]
    assert (with_boxes(GREY, {"boxes": boxes[1:], "labels": torch.tensor([1])}) != 100).any(0)[0].all(), "a label"


def test_the_least_agreement_comes_first_with_values_in_words():
    images = Pixels(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), None)
    before = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    after = torch.tensor([[1.0], [1.0], [2.9], [4.0]])
    found = compare_outputs(tasks.build("regression"), images, (), before, before, after)
    assert [each["index"] for each in found["examples"]] == [1, 2]
    assert found["examples"][0]["values"] == {"original": "2", "artifact": "1", "label": "2"}
    assert found["classes"] == []


def test_scores_by_class_are_none_where_a_class_does_not_occur():
    images = Pixels(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), None)
    targets, before, after = (
        torch.tensor([values]).view(1, 2, 2) for values in ([0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1])
    )
    found = compare_outputs(tasks.build("segmentation"), images, ("a", "b", "c"), targets, before, after)
    assert [each["before"] for each in found["classes"]] == [100, 100, None]
    assert [each["after"] for each in found["classes"][:2]] == [50, 100 * 2 / 3]
    assert found["agreement"] == 75


def test_images_of_any_channels_and_bits_are_shown():
    class Images:
        def __init__(self, pixels):
            self.pixels = pixels

        def take(self, index):
            return self.pixels[index]

    deep = torch.tensor([0x12FF, 0x3400], dtype=torch.int32).to(torch.uint16).view(2, 1, 1, 1)
    assert rgb_of(Images(deep), 0).flatten().tolist() == [0x12] * 3
    four = torch.arange(4, dtype=torch.uint8).view(1, 4, 1, 1)
    assert rgb_of(Images(four), 0).flatten().tolist() == [0, 1, 2]
