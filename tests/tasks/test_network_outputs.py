"""Three forms of the distance between outputs, and reading a user's batch for a task."""

from __future__ import annotations

import pytest
import torch

from tersor import tasks
from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.tasks.calibration_batch import read_batch
from tersor.tasks.network_outputs import (
    relative_errors,
    relative_squared_error,
    relative_squared_error_of_all,
    relative_values,
)


def outputs(seed, images=4):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(images, 3, generator=draw)
    return {"values": values, "maps": [torch.randn(images, 2, 5, 5, generator=draw) * 100], "best": values.argmax(1)}


def test_distances_of_relative_values_equal_the_relative_error_of_the_outputs():
    one, other = outputs(0), outputs(1)
    scales = {key: relative_values(each) for key, each in (("values", other["values"]), ("maps", other["maps"][0]))}
    assert relative_values(other).square().sum() == pytest.approx(4)  # the distance from zero is 1 for each image
    both = [(one["values"], other["values"], scales["values"]), (one["maps"][0], other["maps"][0], scales["maps"])]
    squared = [
        ((first - second) * (scaled / second.flatten(1)).flatten()[0]).square().sum() / 2
        for first, second, scaled in both
    ]
    torch.testing.assert_close(sum(squared), 4 * relative_squared_error(one, other))


def test_relative_values_have_the_expected_gradients():
    values = torch.tensor([[3.0], [4.0]], requires_grad=True)
    relative_values((values,)).sum().backward()
    torch.testing.assert_close(values.grad, torch.full((2, 1), 2**0.5 / 5))


def test_the_error_over_all_batches_is_the_ratio_of_sums():
    halves = [(outputs(0, 2), outputs(1, 2)), (outputs(2, 2), outputs(3, 2))]
    joined = [
        {"values": torch.cat([each["values"] for each in both]), "maps": torch.cat([each["maps"][0] for each in both])}
        for both in zip(*halves, strict=True)
    ]
    assert relative_squared_error_of_all(halves) == pytest.approx(float(relative_squared_error(*joined)), rel=1e-5)
    with pytest.raises(InputError, match="without images"):
        relative_squared_error_of_all([])


IMAGES = torch.zeros(3, 3, 4, 4)
BOXES = [{"boxes": torch.zeros(number, 4), "labels": torch.zeros(number)} for number in range(3)]


@pytest.mark.parametrize(
    ("task", "targets", "expected"),
    [
        ("classification", torch.arange(3), torch.arange(2)),
        ("classification", torch.rand(3), None),
        ("segmentation", torch.ones(3, 4, 4), torch.ones(2, 4, 4)),
        ("detection", BOXES, BOXES[:2]),
        ("regression", {"a": torch.arange(3), "b": (torch.ones(3, 1), "name")}, None),
        ("embedding", torch.arange(3), None),
    ],
)
def test_a_task_reads_the_first_images_and_targets_of_a_batch(task, targets, expected):
    found = read_batch((IMAGES, targets), tasks.build(task), 2)
    assert len(found.images) == 2
    if isinstance(targets, dict):
        assert found.targets["a"].tolist() == [0, 1]
        assert found.targets["b"][0].shape == (2, 1)
        assert found.targets["b"][1] == "name"
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found.targets, expected)
    else:
        assert found.targets == expected
    assert len(read_batch(Batch(IMAGES, targets), tasks.build(task)).images) == 3


def test_relative_errors_of_one_value_per_image():
    assert relative_errors(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])).tolist() == [0.5, 0.0]
