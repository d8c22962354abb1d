"""Standard errors of the accuracy, and of its difference from the original."""

import math

import numpy as np
import pytest
import torch

from tersor.evaluation.standard_error import (
    error_of_difference,
    error_of_drop,
    measures_accuracy,
    right_of,
    standard_error,
)
from tersor.tasks.classification import Classification
from tersor.tasks.functions import FromFunctions
from tersor.tasks.segmentation import Segmentation


def test_the_error_of_a_drop_is_computed_from_paired_differences():
    draw = np.random.default_rng(0)
    original = draw.random(1000) < 0.9
    changed = original ^ (draw.random(1000) < 0.05)
    drops = [100 * (changed[index].mean() - original[index].mean()) for index in draw.integers(0, 1000, (2000, 1000))]
    assert error_of_drop(changed, original, 90.0, 1000) == pytest.approx(np.std(drops), rel=0.1)
    assert error_of_drop(changed, original, 90.0, 1000) < standard_error(90.0, 1000)
    assert 0 < error_of_drop(original, original, 90.0, 1000) < 0.2


def test_without_predictions_of_both_networks_the_standard_error_is_used():
    assert error_of_drop(None, np.ones(9, bool), 80.0, 100) == pytest.approx(4.0)


def test_a_users_loss_keeps_the_accuracy_as_metric_and_a_users_metric_does_not():
    assert measures_accuracy(FromFunctions(Classification(), lambda *_: None, None))
    assert not measures_accuracy(FromFunctions(Classification(), None, lambda *_: 0.5))
    assert not measures_accuracy(Segmentation())


class Balanced(Classification):
    def score(self, pairs):
        return self.score_by_class(pairs, 2).mean().item()


def test_a_classification_task_with_its_own_score_has_no_paired_error():
    assert not measures_accuracy(Balanced())
    assert not measures_accuracy(FromFunctions(Balanced(), lambda *_: None, None))
    predictions, targets = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    assert right_of(Classification(), predictions, targets).tolist() == [True, True, True, False]
    assert right_of(Balanced(), predictions, targets) is None


def test_the_difference_between_two_sets_of_images_has_the_pooled_error():
    images = 300, 1000
    pooled = (99 * 300 + 95 * 1000) / 1300 / 100
    expected = 100 * math.sqrt(pooled * (1 - pooled) * (1 / 300 + 1 / 1000))
    assert error_of_difference((99.0, 95.0), images) == pytest.approx(expected)
    assert round(expected, 2) == 1.30, "the example of docs/how-to/budget.md"
    assert error_of_difference((83.25, 76.10), (400, 1000)) == pytest.approx(2.445, abs=1e-3)
    assert error_of_difference((100.0, 100.0), images) > 0
