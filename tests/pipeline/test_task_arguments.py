"""The task of the Python functions, and the labels of a user's batches."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor import tasks
from tersor.core.errors import InputError
from tersor.pipeline.task_arguments import (
    all_labels,
    check_targets,
    labelled,
    targets_for,
    task_of,
    task_of_both,
    task_of_files,
)
from tersor.tasks.classification import Classification
from tersor.tasks.distance import Distance
from tersor.tasks.functions import FromFunctions
from tersor.tasks.multilabel import Multilabel

IMAGES = torch.zeros(2, 3, 4, 4)


class Outputs(nn.Module):
    """Returns the given outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs = outputs

    def forward(self, _images):
        return self.outputs


def logits(*shape):
    return Outputs(torch.zeros(2, *shape))


def test_the_task_is_built_from_the_arguments():
    assert task_of(None) is None
    assert isinstance(task_of("multilabel"), Multilabel)
    own = task_of(None, loss=max)
    assert isinstance(own, FromFunctions)
    assert isinstance(own.base, Distance)
    assert isinstance(task_of("multilabel", metric=max).base, Multilabel)
    with pytest.raises(InputError, match="loss is the class Linear"):
        task_of(None, loss=nn.Linear)
    with pytest.raises(InputError, match="metric is of type int"):
        task_of(None, metric=3)


def test_two_networks_that_return_logits_are_classifiers():
    task, classes = task_of_both(None, logits(3), logits(3), IMAGES)
    assert isinstance(task, Classification)
    assert classes == 3
    task, classes = task_of_both(None, logits(3, 4, 4), logits(3, 4, 4), IMAGES)
    assert isinstance(task, Distance)
    assert classes is None
    assert task_of_both(tasks.build("multilabel"), logits(1), logits(1), IMAGES)[1] is None
    for given in ((logits(3), logits(4)), (logits(3), logits(3, 4)), (logits(3), Outputs([torch.zeros(2)] * 2))):
        with pytest.raises(InputError, match="for two images the student returns"):
            task_of_both(None, *given, IMAGES)
    with pytest.raises(InputError, match="return one logit for each image"):
        task_of_both(None, logits(1), logits(1), IMAGES)
    task_of_both(None, logits(2), logits(2), IMAGES)
    with pytest.raises(InputError, match="two outputs cannot be compared"):
        task_of_both(None, logits(3, 4, 4), logits(4, 4, 4), IMAGES)
    with pytest.raises(InputError, match="logits of 2 classes, the teacher of 3"):
        task_of_both(tasks.build("multilabel"), logits(2), logits(3), IMAGES)


def test_targets_are_kept_only_if_they_are_class_indices():
    batches = [(IMAGES, torch.tensor([0, 2])), (IMAGES, torch.tensor([0, 3])), IMAGES, (IMAGES, torch.tensor([1, 1]))]
    found = [None if each.targets is None else each.targets.tolist() for each in labelled(batches, 3, 9)]
    assert found == [[0, 2], None, None, [1, 1]]
    assert len(list(labelled(batches, 3, 2))) == 2


def test_all_labels_of_a_loader_are_concatenated_and_checked():
    both = [(IMAGES, torch.tensor([0, 2])), (IMAGES[:1], torch.tensor([1]))]
    assert all_labels(both, 3).tolist() == [0, 2, 1]
    assert all_labels([], 3).tolist() == []
    assert all_labels([*both, (IMAGES, None)], 3) is None
    with pytest.raises(InputError, match="2"):
        all_labels(both, 2)
    one_based = [(IMAGES, torch.tensor([1, 2])), (IMAGES, torch.tensor([2, 3]))]
    with pytest.raises(InputError, match="the labels range from 1 to 3"):
        all_labels(one_based, 3)
    with_zero = [(IMAGES, torch.tensor(labels)) for labels in ([0, 1], [2, 2], [1, 3])]
    with pytest.raises(InputError, match="because the network has 3 classes"):
        all_labels(with_zero, 3)


def test_the_targets_of_the_first_batches_are_checked():
    task = Classification()
    right, wrong = (IMAGES, torch.tensor([0, 1])), (IMAGES, torch.tensor([0, 9]))
    check_targets(task, logits(2), [right, right, wrong], 4)
    with pytest.raises(InputError, match="9"):
        check_targets(task, logits(2), [right, right, wrong], 5)
    check_targets(task, logits(2), [IMAGES], 1)
    with pytest.raises(InputError, match=r"the cross entropy needs logits \(2, classes\)"):
        check_targets(task, logits(1), [right], 1)
    with pytest.raises(InputError, match=r"the cross entropy needs logits \(2, classes\)"):
        check_targets(task, logits(2, 2), [right], 1)
    with pytest.raises(InputError, match=r"^importance='taylor' needs .* no labels\. .* or importance='magnitude'\.$"):
        check_targets(tasks.build("multilabel"), logits(2), [right, IMAGES], 4)
    check_targets(tasks.build("multilabel"), logits(2), [right, IMAGES], 2)
    check_targets(Distance(), logits(2), [IMAGES], 1)


def of_files(monkeypatch, task, **outputs):
    monkeypatch.setattr("tersor.pipeline.task_arguments.file_outputs", lambda session, _: session)
    return task_of_files(task, outputs, dict.fromkeys(outputs, np.zeros((2, 3, 4, 4))))


def test_files_with_logits_are_classifiers_and_others_are_compared_by_distance(monkeypatch):
    two, maps = torch.zeros(2, 3), torch.zeros(2, 3, 4, 4)
    assert isinstance(of_files(monkeypatch, None, a=two, b=two), Classification)
    assert isinstance(of_files(monkeypatch, None, a=maps, b=maps), Distance)
    assert isinstance(of_files(monkeypatch, None, a={"x": two, "y": maps}, b={"x": two, "y": maps}), Distance)
    both = {"logits": two, "y": maps}
    assert isinstance(of_files(monkeypatch, None, a=both, b=both), Classification)
    with pytest.raises(InputError, match="the files differ in the number of logits per image: a 3, b 4"):
        of_files(monkeypatch, None, a=two, b=torch.zeros(2, 4))
    with pytest.raises(InputError, match="b returns NaN for the first images"):
        of_files(monkeypatch, None, a=two, b=two.clone().fill_(float("nan")))
    with pytest.raises(InputError, match="two outputs cannot be compared"):
        of_files(monkeypatch, Distance(), a=two, b=maps)


def test_the_targets_of_all_batches_are_concatenated():
    batches = [(IMAGES, torch.tensor([0, 1])), (IMAGES[:1], torch.tensor([1]))]
    assert targets_for(Classification(), batches, torch.zeros(3, 2)).tolist() == [0, 1, 1]
    assert targets_for(Classification(), batches, torch.zeros(3, 1)).tolist() == [0, 1, 1], "one logit, two classes"
    with pytest.raises(InputError, match="2"):
        targets_for(Classification(), [(IMAGES, torch.tensor([0, 2]))], torch.zeros(2, 2))
    values = [(images, targets.float()) for images, targets in batches]
    assert targets_for(tasks.build("regression"), values, torch.zeros(3)).tolist() == [0, 1, 1]
