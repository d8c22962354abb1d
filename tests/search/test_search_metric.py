"""The metric of a search."""

import pytest
import torch

from tersor.core.errors import InputError
from tersor.search.search_metric import measured, refuse_other_metrics
from tersor.tasks.classification import Classification
from tersor.tasks.functions import FromFunctions
from tersor.tasks.regression import Regression
from tersor.tasks.segmentation import Segmentation


class Balanced(Classification):
    def score(self, pairs):
        return self.score_by_class(pairs, 2).mean().item()


def test_a_classification_task_with_its_own_score_has_no_correct_images():
    predictions, targets = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    assert measured(Classification(), predictions, targets).right.tolist() == [True, True, True, False]
    assert (measured(Balanced(), predictions, targets).metric, measured(Balanced(), predictions, targets).right) == (
        50.0,
        None,
    )


def test_error_metrics_raise_and_a_users_metric_is_accepted():
    refuse_other_metrics(FromFunctions(Segmentation(), None, lambda *_: 0.5))
    with pytest.raises(InputError, match="higher is better"):
        refuse_other_metrics(Regression())
