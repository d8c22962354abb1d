"""Every task: loss, metric and agreement, compared with values computed by hand."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torchmetrics import MeanAbsoluteError

from tersor import tasks
from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.tasks.functions import FromFunctions
from tersor.tasks.network_outputs import described, in_float32, logits_in
from tersor.tasks.task import Task, with_label_smoothing
from tersor.training.objective import Objective, Outputs

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 5.0], [4.0, 1.0, 0.0]])
LABELS = torch.tensor([0, 1, 2, 1])
BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


class Own(Task):
    """A user's own task."""

    metric = "largest error"
    higher_is_better = False

    def loss(self, outputs, targets):
        return (outputs["values"] - targets).abs().mean()

    def score(self, pairs):
        return max(float((outputs["values"] - targets).abs().max()) for outputs, targets in pairs)


def detected(boxes=BOX, score=0.9, label=1):
    return {"boxes": boxes, "scores": torch.full((len(boxes),), score), "labels": torch.full((len(boxes),), label)}


@pytest.mark.parametrize("name", tasks.NAMES)
def test_every_task_is_built_by_name(name):
    task = tasks.build(name)
    assert tasks.name_of(task) == name
    assert task.metric
    assert tasks.build(task) is task


def test_a_users_task_is_built_from_its_path():
    task = tasks.build(f"{__name__}:Own")
    assert isinstance(task, Own)
    assert tasks.name_of(task) == f"{__name__}:Own"

    class Network(torch.nn.Module):
        def forward(self, images):
            return {"values": images}

    assert Objective(Network(), task=task)(Batch(torch.ones(2), torch.zeros(2)))["labels"] == 1


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("segmantation", {}, "unknown task 'segmantation'. Did you mean 'segmentation'"),
        ("segmentation", {"num_classes": 1}, "num_classes is 1. It must be at least 2"),
        ("segmentation", {"classes": 3}, "Segmentation has no parameter 'classes'. Did you mean 'num_classes'"),
        ("math:sqrt", {}, "cannot be called"),
        ("collections:OrderedDict", {}, "the task is of type OrderedDict"),
        (3, {}, "the task is of type int"),
    ],
)
def test_invalid_tasks_raise(name, parameters, message):
    with pytest.raises(InputError, match=message):
        tasks.build(name, **parameters)


def test_loss_score_and_agreement_of_classification():
    task = tasks.build("classification")
    assert torch.equal(
        task.loss({"logits": LOGITS, "hidden": LOGITS[:, None]}, LABELS), F.cross_entropy(LOGITS, LABELS)
    )
    predictions = task.predictions(LOGITS)
    assert predictions.tolist() == [0, 1, 2, 0]
    assert task.score([(predictions[:3], LABELS[:3]), (predictions[3:], LABELS[3:])]) == 75
    assert task.score_by_class([(predictions, LABELS)], 3).tolist() == [100, 50, 100]
    assert task.agreement(predictions, torch.tensor([0, 1, 1, 1])).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 13], "from 0 to 13. Possible: class indices .* because the network has 4 classes"),
        ([1, 4], "numbered from 0 to 3. Write labels - 1"),
        ([0, 1, 2], r"the shape \(3,\). Possible"),
        ([0, -1], "Leave out unlabeled images"),
        ([0.5, 1.0], r"Write labels.long\(\)"),
    ],
)
def test_labels_that_are_not_class_indices_of_the_logits_raise(targets, message):
    with pytest.raises(InputError, match=message):
        tasks.build("classification").loss(torch.randn(2, 4), torch.tensor(targets))


def test_a_single_logit_is_compared_with_zero_and_probabilities_raise():
    task = tasks.build("classification")
    assert task.predictions(torch.tensor([[-2.0], [0.5], [3.0]])).tolist() == [0, 1, 1]
    with pytest.raises(InputError, match="logits or probabilities"):
        task.predictions(torch.tensor([[0.2], [0.8]]))


def test_label_smoothing_is_supported_by_classification_only():
    smooth = with_label_smoothing(tasks.build("classification"), 0.2)
    assert torch.equal(smooth.loss(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS, label_smoothing=0.2))
    with pytest.raises(InputError, match=r"label_smoothing is 0.2, but the loss of Regression does not support it"):
        with_label_smoothing(tasks.build("regression"), 0.2)


def test_segmentation_ignores_pixels_and_averages_over_occurring_classes():
    task = tasks.build("segmentation", num_classes=4)
    targets = torch.tensor([[[0, 0], [1, 255]]])
    logits = F.one_hot(torch.tensor([[[0, 1], [1, 2]]]), 4).permute(0, 3, 1, 2).float()
    mask = task.predictions({"out": logits, "aux": logits})
    assert mask.dtype == torch.uint8
    # class 0: 1 of 2 pixels; class 1: 1 of 2; classes 2 and 3 do not occur where pixels count
    assert task.score([(mask, targets)]) == pytest.approx(50)
    assert task.score_by_class([(mask, targets)], 4).nan_to_num(-1).tolist() == [50, 50, -1, -1]
    assert tasks.build("segmentation").score([(mask, targets)]) == pytest.approx(50)
    counted = F.cross_entropy(logits.permute(0, 2, 3, 1)[0].flatten(0, 1)[:3], torch.tensor([0, 0, 1]))
    torch.testing.assert_close(task.loss(logits, targets), counted)
    assert task.agreement(mask, torch.zeros_like(mask)).tolist() == [0.25]


def test_segmentation_logits_can_have_a_lower_resolution_than_the_masks():
    task = tasks.build("segmentation")
    logits = torch.randn(2, 3, 4, 4)
    targets = task.predictions(logits).long().repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert task.score([(task.predictions(logits), targets)]) == 100
    larger = F.interpolate(logits, (8, 8), mode="bilinear")
    torch.testing.assert_close(task.loss(logits, targets), F.cross_entropy(larger, targets))


def test_loss_score_and_agreement_of_multilabel_classification():
    task = tasks.build("multilabel")
    logits, targets = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0]]), torch.tensor([[1, 0, 0], [0, 1, 0]])
    assert task.loss(logits, targets) == F.binary_cross_entropy_with_logits(logits, targets.float())
    predictions = task.predictions(logits)
    # class 0: precision 1/2, recall 1; class 1: all right; class 2 does not occur
    assert task.score([(predictions, targets)]) == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert task.agreement(predictions, targets.bool()).tolist() == pytest.approx([1, 2 / 3])
    by_class = task.score_by_class([(predictions[:1], targets[:1]), (predictions[1:], targets[1:])], 3)
    assert by_class.nan_to_num(-1).tolist() == pytest.approx([100 * 2 / 3, 100, -1])
    with pytest.raises(InputError, match=r"Pass 0 or 1 for each image and class"):
        task.loss(logits, torch.tensor([0, 1]))


def test_detection_scores_boxes_and_compares_confident_ones():
    task = tasks.build("detection")
    apart = BOX + 20
    targets = [{"boxes": BOX, "labels": torch.tensor([1])}, {"boxes": apart, "labels": torch.tensor([2])}]
    right = [detected(), detected(apart, label=2)]
    assert task.score([(task.predictions(right), targets)]) == pytest.approx(100)
    assert task.score([(task.predictions([detected(), detected(apart, label=1)]), targets)]) == pytest.approx(50)
    by_class = task.score_by_class([(task.predictions(right), targets)], 4)
    assert by_class.nan_to_num(-1).tolist() == pytest.approx([-1, 100, 100, -1])
    assert task.agreement(right, [detected(BOX + 1), detected(apart, score=0.3, label=2)]).tolist() == [1, 0]
    half = [{"boxes": torch.cat([BOX, apart]), "labels": torch.tensor([1, 1])}]
    by_class = task.score_by_class([(task.predictions([detected()]), half)], 2)
    assert by_class[1] == pytest.approx(50, abs=1), "one of two boxes is found"
    several = torch.cat([BOX, BOX + 2, BOX + 40])
    assert task.agreement([detected(several)], [detected(several[:2])]).tolist() == pytest.approx([2 * 2 / 5])
    assert task.agreement([detected(BOX)], [detected(several[:2])]).tolist() == pytest.approx([2 / 3]), "used once"
    assert task.agreement([detected(score=0.4)], [detected(score=0.4)]).tolist() == [1], "no confident box in both"
    assert task.agreement([detected()], [detected(label=2)]).tolist() == [0]
    batched = {key: torch.stack([one[key] for one in right]) for key in right[0]}
    assert task.score([(task.predictions(batched), targets)]) == pytest.approx(100)


def test_images_with_many_boxes_are_scored_without_a_warning():
    task = tasks.build("detection")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = task.score([([detected(BOX.repeat(150, 1))], [{"boxes": BOX, "labels": torch.tensor([1])}])])
    assert found == pytest.approx(100)


def test_a_detector_returns_its_own_losses_in_training_mode():
    class Detector(torch.nn.Module):
        def forward(self, images, targets=None):
            return {"class": images.mean(), "box": targets[0]["boxes"].mean()} if self.training else [detected()]

    task = tasks.build("detection")
    batch = Batch(torch.ones(1, 3, 8, 8), [{"boxes": BOX, "labels": torch.tensor([1])}])
    assert Objective(Detector(), task=task).train()(batch)["labels"] == pytest.approx(6.0)
    with pytest.raises(InputError, match="a detector returns a dict of losses"):
        task.loss([detected()], batch.targets)


EXPECTED = "a detector returns a dict of boxes, scores, labels for each image"


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([detected(), {"boxes": BOX, "labels": torch.tensor([1])}], f"{EXPECTED}; the dict of image 1 has no scores."),
        ({"boxes": BOX}, f"{EXPECTED}; the dict has no scores, labels."),
        ([detected(), 3], f"{EXPECTED}, not an object of type int."),
        (torch.zeros(2, 6), f"{EXPECTED}, not a tensor of shape (2, 6)."),
    ],
)
def test_the_error_for_invalid_detections_names_the_missing_part(outputs, message):
    with pytest.raises(InputError) as caught:
        tasks.build("detection").predictions(outputs)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "outputs", "end"),
    [
        ("embedding", torch.zeros(4), r"one tensor \(N, dimensions\), not a tensor of shape \(4,\)\.$"),
        ("multilabel", torch.zeros(4, 10, 1, 1), r"logits \(N, classes\), not a tensor of shape \(4, 10, 1, 1\)\.$"),
        ("segmentation", torch.zeros(4, 10), r"logits \(N, classes, H, W\), not a tensor of shape \(4, 10\)\.$"),
        ("embedding", None, r"not an object of type NoneType\.$"),
    ],
)
def test_the_error_for_a_wrong_tensor_contains_its_shape(name, outputs, end):
    with pytest.raises(InputError, match=end):
        tasks.build(name).predictions(outputs)


def test_regression_accepts_targets_with_one_value_per_image():
    task = tasks.build("regression")
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([2.0, 5.0])
    assert task.loss(outputs, targets) == pytest.approx(2.5)
    assert task.score([(task.predictions(outputs), targets)]) == pytest.approx(1.5)
    assert task.agreement(outputs, outputs).tolist() == [1, 1]
    with pytest.raises(InputError, match="as many values for each image"):
        task.loss(outputs, torch.zeros(2, 3))


def test_embedding_compares_directions():
    task = tasks.build("embedding")
    outputs, original = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert task.from_original
    assert task.loss(outputs, original) == pytest.approx(0.5)
    assert task.score([(outputs, original)]) == pytest.approx(0.5)
    assert task.agreement(outputs, -original).tolist() == [0, 0]


def test_distance_is_the_relative_error_over_all_tensors_of_the_outputs():
    task = tasks.build("distance")
    original = {"a": torch.tensor([[3.0, 4.0]]), "b": (torch.tensor([[10.0]]), torch.tensor([1]))}
    outputs = {"a": torch.tensor([[3.0, 3.0]]), "b": (torch.tensor([[8.0]]), torch.tensor([2]))}
    squared = (1 / 25 + 4 / 100) / 2
    assert float(task.loss(outputs, original)) == pytest.approx(squared)
    assert task.score([(outputs, original)] * 3) == pytest.approx(100 * math.sqrt(squared))
    assert task.agreement(outputs, original).tolist() == pytest.approx([1 - math.sqrt(squared)])
    same = torch.ones(2, requires_grad=True)
    task.loss(same, torch.ones(2)).backward()
    assert same.grad.tolist() == [0, 0]
    with pytest.raises(InputError, match="two outputs cannot be compared"):
        task.loss(outputs, outputs["a"])


def test_an_error_in_a_users_task_is_reported_with_its_line():
    outputs = {"values": torch.ones(2)}
    with pytest.raises(InputError, match=rf"loss of Own failed in {__file__}, line \d+ .*: RuntimeError: The size"):
        Own().loss(outputs, torch.ones(3))
    with pytest.raises(InputError, match=rf"score of Own failed in {__file__}, line \d+ .*: KeyError: 'values'"):
        Own().score([({}, torch.ones(2))])


class WithFunctions(Own):
    """The loss is a static method, the score a class method, the agreement a callable object."""

    agreement = torch.nn.PairwiseDistance()

    @staticmethod
    def loss(outputs, targets):
        return (outputs - targets).abs().mean()

    @classmethod
    def score(cls, pairs):
        return sum(float(outputs) for outputs, _ in pairs)


def test_methods_of_a_task_can_be_static_methods_class_methods_and_callable_objects():
    task = WithFunctions()
    assert task.loss(torch.ones(2), torch.zeros(2)) == 1
    assert task.score([(torch.ones(1), None)]) == 1
    assert task.agreement(torch.zeros(2, 4), torch.ones(2, 4)).shape == (2,)
    with pytest.raises(InputError, match=rf"loss of WithFunctions failed in {__file__}, line"):
        task.loss(torch.ones(2), torch.ones(3))


def test_the_objective_uses_the_outputs_of_the_teacher_as_targets_of_distance():
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    batch = Batch(torch.randn(2, 4))
    task = tasks.build("distance")
    losses = Objective(student, teacher=teacher, task=task)(batch)
    torch.testing.assert_close(losses["labels"], task.loss(student(batch.images), teacher(batch.images)))


def test_scores_are_formatted():
    assert tasks.build("classification").shown(71.2) == "71.20 %"
    assert tasks.build("regression").shown(0.12345) == "0.1235"


def test_a_users_loss_and_metric_replace_those_of_a_task():
    base = tasks.build("multilabel")
    logits, targets = torch.tensor([[1.0, -1.0]]), torch.tensor([[1, 1]])
    own = FromFunctions(base, lambda outputs, _: outputs.sum(), None)
    assert (own.metric, own.unit, own.higher_is_better, own.independent_classes) == ("F1", "%", True, True)
    assert own.loss(logits, targets) == 0
    assert own.logits(logits) is logits
    assert own.predictions(logits).tolist() == [[True, False]]
    assert own.score([(own.predictions(logits), targets)]) == base.score([(base.predictions(logits), targets)]) == 50
    assert own.score_by_class([(own.predictions(logits), targets)], 2).tolist() == [100, 0]
    measured = FromFunctions(base, None, lambda outputs, _: float(outputs.sum()) + 3)
    assert (measured.unit, measured.higher_is_better) == ("", True)
    assert measured.loss(logits, targets) == base.loss(logits, targets)
    assert measured.predictions(logits).tolist() == logits.tolist()
    assert measured.score([(logits, targets)]) == 3
    assert measured.score_by_class([(logits, targets)], 2) is None
    assert measured.agreement(logits, -logits).tolist() == [0]
    detection = tasks.build("detection")
    batch = Batch(torch.zeros(1, 3, 4, 4), ["target"])
    assert len(FromFunctions(detection, None, None).inputs(batch, training=True)) == 2
    assert len(FromFunctions(detection, None, None).inputs(batch, training=False)) == 1
    assert FromFunctions(tasks.build("segmentation"), None, None).ignore_index == 255
    distance = tasks.build("distance")
    assert FromFunctions(distance, None, None).from_original
    assert not FromFunctions(distance, None, lambda *_: 1.0).from_original
    assert not FromFunctions(distance, lambda *_: 1.0, None).from_original
    assert not FromFunctions(distance, None, None).higher_is_better


def test_a_torchmetrics_metric_is_computed_over_all_batches():
    metric = MeanAbsoluteError()
    own = FromFunctions(tasks.build("regression"), None, metric)
    assert not own.higher_is_better
    pairs = [(torch.tensor([1.0, 2.0]), torch.zeros(2)), (torch.tensor([6.0]), torch.zeros(1))]
    assert own.score(pairs) == own.score(pairs) == 3, "it is reset"
    assert own.metric == "MeanAbsoluteError"


def test_the_logits_are_found_among_several_outputs():
    maps = LOGITS[..., None, None]
    assert logits_in({"hidden": LOGITS, "out": maps}, 4, ("logits", "out")) is maps
    assert logits_in({"hidden": LOGITS, "out": maps}, 2) is LOGITS
    assert logits_in([LOGITS, "text"]) is LOGITS
    assert logits_in((LOGITS, LOGITS), 2) is None
    assert logits_in((LOGITS, maps), 3) is None
    assert in_float32({"a": LOGITS.double(), "b": LABELS, "c": "text"})["a"].dtype == torch.float32
    assert in_float32([LABELS])[0].dtype == torch.int64
    assert described({"a": [LOGITS, 3]}) == "a dict with a (a list of shape (4, 3), a int)"


def test_outputs_have_logits_only_if_the_task_has_them():
    assert torch.equal(Outputs({"logits": LOGITS, "hidden": LOGITS}).logits, LOGITS)
    with pytest.raises(InputError, match="has no logits for the task"):
        _ = Outputs((LOGITS, LOGITS)).logits


@pytest.mark.parametrize("name", tasks.NAMES)
def test_a_metric_without_images_or_targets_raises(name):
    task = tasks.build(name)
    with pytest.raises(InputError, match="without images"):
        task.score([])
    with pytest.raises(InputError, match="without labels"):
        task.score([(LOGITS, None)])
