import pytest
import torch

from tersor.core.errors import InputError
from tersor.data.boxes import box_target, scaled


def test_boxes_are_scaled_with_the_image():
    target = box_target([[10, 20, 30, 60]], [2], (100, 50), "it")
    assert scaled(target, (100, 50), (50, 100))["boxes"].tolist() == [[20, 10, 60, 30]]
    assert scaled(target, (100, 50), (100, 50)) is target


def test_an_image_can_have_no_boxes():
    target = box_target([], [], (10, 10), "it")
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64
    assert scaled(target, (10, 10), (5, 5))["boxes"].shape == (0, 4)


def test_boxes_are_clipped_at_the_edge_of_the_image():
    assert box_target([[-1, 0, 11, 10]], [1], (10, 10), "it")["boxes"].tolist() == [[0, 0, 10, 10]]


@pytest.mark.parametrize(
    ("boxes", "labels", "words"),
    [
        ([[0, 0, 12, 5]], [1], "it has the box 0, 0, 12, 5, which is outside its image of 10x20 pixels"),
        ([[-2, 0, 5, 5]], [1], "outside"),
        ([[0, float("nan"), 5, 5]], [1], "outside"),
        ([[5, 5, 5, 9]], [1], "has no area"),
        ([[5, 5, 4, 9]], [1], "has no area"),
        ([[1, 1, 2, 2]], [0], "the label 0. Number the classes of boxes from 1"),
        ([[1, 1, 2, 2]], [], "number of boxes: 1, number of labels: 0"),
        ([[1, 1, 2]], [1], "boxes that are not an array of numbers"),
        ("boxes", [1], "boxes that are not an array of numbers"),
    ],
)
def test_invalid_boxes_raise(boxes, labels, words):
    with pytest.raises(InputError, match=words):
        box_target(boxes, labels, (20, 10), "it")
