"""Checks of the networks of an Experiment: they accept the images, and their outputs fit the task and the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tersor import tasks
from tersor.core.errors import InputError
from tersor.core.progress import ProgressReporter
from tersor.data import Splits
from tersor.data.image_sets import View
from tersor.data.stratified import generator
from tersor.graph.eval_mode import check_forward, evaluating
from tersor.graph.plain_network import refuse_without_weights
from tersor.pipeline.experiment import EVALUATION_BATCH, Experiment
from tersor.recipe import Recipe, Teacher
from tersor.tasks.classification import Classification
from tersor.tasks.network_outputs import described, in_float32
from tersor.training.normalization_check import normalization_warning
from tersor.training.teacher_check import IMAGES as TEACHER_IMAGES
from tersor.training.teacher_check import level_warning, teacher_warnings

_WRITE_MEAN = (
    "The mean and std used here were computed from the training images, because none were given: write data.mean and "
    "data.std in a recipe, or --mean and --std of `tersor compress`."
)


def _random_weights(experiment: Experiment) -> str:
    """A line about a network without weights: a warning unless a stage trains it."""
    line = f"{experiment.recipe.model.name} has random weights, because model.weights is missing"
    if any(experiment.steps_of(stage) for stage in experiment.recipe.stages):
        return f"{line}; it is trained from scratch"
    return f"warning: {line}, and no stage trains it. All results are those of random weights. Write model.weights."


def check_networks(experiment: Experiment, progress: ProgressReporter, *, mean_is_computed: bool) -> None:
    """Check the model and the teacher, and report doubts about their accuracy and about the normalization.

    Args:
        experiment: the experiment.
        progress: receives the warnings.
        mean_is_computed: whether mean and std were computed from the training images, because none were given.

    Raises:
        InputError: one cannot be used with the images or for the task, or the computed mean and std are wrong.
    """
    recipe, teacher, name = experiment.recipe, experiment.teacher, experiment.recipe.model.name
    refuse_without_weights(experiment.model, name)
    _check_outputs(experiment, experiment.model, name)
    if teacher is not None and recipe.teacher != "original":
        _check_outputs(experiment, teacher, "the teacher")
    if recipe.teacher == "original" and not experiment.model_is_trained:
        raise InputError(
            "teacher: original means the model before compression, which has no weights. Write model.weights."
        )
    if experiment.task.from_original and teacher is None and not experiment.model_is_trained:
        raise InputError(
            f"task {tasks.name_of(experiment.task)} compares the outputs with those of the model before compression, "
            "which has no weights. Write model.weights."
        )
    _check_teacher(recipe)
    if not experiment.model_is_trained:
        progress.say(_random_weights(experiment))
    if isinstance(experiment.task, Classification):
        for doubt in _doubts(experiment, mean_is_computed=mean_is_computed):
            progress.say(f"warning: {doubt}")


def _doubts(experiment: Experiment, *, mean_is_computed: bool) -> list[str]:
    """Doubts about the accuracy of classifiers and about the normalization."""
    recipe, teacher, data, name = experiment.recipe, experiment.teacher, experiment.data, experiment.recipe.model.name
    few = experiment.batches(few_of(experiment, TEACHER_IMAGES), EVALUATION_BATCH)
    doubts = list[str]()
    if teacher is not None and experiment.teacher_is_trained:
        doubts += teacher_warnings("the teacher", teacher, few)
    if experiment.model_is_trained and recipe.teacher != "original":
        doubts.append(level_warning(name, experiment.model, few, experiment.task))
    if experiment.model_is_trained:
        doubt = normalization_warning(name, experiment.model, few, experiment.task, data.mean, data.std)
        if doubt and mean_is_computed:
            raise InputError(f"{doubt} {_WRITE_MEAN}")
        doubts.append(doubt)
    return [doubt for doubt in doubts if doubt]


def few_of(experiment: Experiment, images: int) -> View:
    """A random subset of the training images, fixed by the seed."""
    train, draw = experiment.data.train, generator(experiment.recipe.seed)
    return View(train, torch.randperm(len(train), generator=draw)[:images])


def _check_teacher(recipe: Recipe) -> None:
    teacher = recipe.teacher
    if isinstance(teacher, Teacher) and teacher.weights is None and not teacher.epochs:
        raise InputError("the teacher is untrained. Write teacher.weights, or teacher.epochs to train it first.")
    if isinstance(teacher, Teacher) and teacher.weights is not None and teacher.epochs:
        raise InputError(
            "the teacher has both weights and epochs. Write one of them: with epochs it is trained from scratch."
        )


def _check_outputs(experiment: Experiment, network: nn.Module, name: str) -> None:
    """Check by one forward pass that the network accepts the images, and that its outputs fit the task."""
    batch, task = next(iter(experiment.batches(experiment.data.test, 2))), experiment.task
    with evaluating(network):
        outputs = check_forward(name, network, batch.images)
    if isinstance(task, Classification):
        _check_logits(experiment, outputs, name)
        return
    try:
        predictions = task.predictions(in_float32(outputs))
        task.score([(predictions, predictions if task.from_original else batch.targets)])
    except InputError as error:
        raise InputError(f"{name} does not fit task {tasks.name_of(task)}: {error}") from error


def _check_logits(experiment: Experiment, logits: Any, name: str) -> None:
    classes = len(experiment.data.classes)
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.shape[1] == classes:
        return
    if isinstance(logits, torch.Tensor) and logits.shape == (2, classes - 1):
        refuse_labels_from_one(experiment.data, name)
    if not isinstance(logits, torch.Tensor):
        advice = "Write a function package.module:function that wraps the network and returns its logits alone."
    else:
        advice = (
            f"Give a network that returns {classes} logits, and its weights. If the recipe names a built-in network, "
            f"write num_classes: {classes}; if it names your own function, change the function."
        )
    raise InputError(
        f"for two images {name} returns {described(logits)}, but the data has {classes} classes, so logits "
        f"(2, {classes}) are needed. {advice}"
    )


def refuse_labels_from_one(data: Splits, whose: str) -> None:
    labels = torch.cat([data.train.targets, data.test.targets])
    if int(labels.min()) != 1:
        return
    last = int(labels.max())
    raise InputError(
        f"the labels range from 1 to {last}; class 0 has no image. The data is read as {last + 1} classes, but {whose} "
        f"has {last}. Number the classes from 0 to {last - 1}: subtract 1 from every label. If class 0 is meant to "
        f"have no image, the network needs {last + 1} logits, and weights for them."
    )
