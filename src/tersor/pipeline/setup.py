"""From a recipe to an Experiment: load networks and data and check that they match, before any training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from tersor import models, tasks
from tersor.checkpoint.structure import structure
from tersor.core.device import seeded
from tersor.core.errors import InputError
from tersor.core.import_path import is_function_path
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.data import Splits, load
from tersor.data.augmentation import described as described_augmentation
from tersor.data.image_sets import class_numbers
from tersor.data.splitting import drawn_test_set
from tersor.evaluation.costs import macs_ratio
from tersor.evaluation.session import load_runtime
from tersor.graph.plain_network import folding_notes, plain_copy
from tersor.pipeline.artifact_settings import normalization_line
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.loss_check import check_losses
from tersor.pipeline.network_checks import check_networks, few_of, refuse_labels_from_one
from tersor.pipeline.stages import attach
from tersor.recipe import Network, Recipe, Teacher
from tersor.recipe.data_source import YOUR_DATA
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task
from tersor.training.schedule import learning_rates, steps_per_epoch

_FEW = 64
"""Images for the trial attachment of every stage."""


def prepare(
    recipe: Recipe,
    *,
    model: nn.Module | None,
    data: Splits | None,
    progress: ProgressReporter,
    teacher: nn.Module | None = None,
    own_mean: bool = False,
) -> Experiment:
    """Load the networks and images of a recipe and check them against each other.

    Args:
        recipe: the recipe.
        model: replaces its model.
        data: replaces its data.
        progress: receives the progress.
        teacher: replaces its teacher.
        own_mean: whether `data` may have a mean that was not computed from its training images.

    Raises:
        InputError: a file, a network or the data cannot be used, or they do not match.
    """
    load_runtime(recipe.target.runtime)
    if data is None and recipe.data.name == YOUR_DATA:
        raise InputError(
            f"the images of this search were passed in Python: {YOUR_DATA} in its recipe is a placeholder. Write "
            "data: {folder: PATH}, or data: {name: your_file.py:function} with a function that returns them."
        )
    for network in (recipe.model, recipe.teacher):
        if isinstance(network, Network) and network.weights is not None and not network.weights.is_file():
            problem = "is a folder" if network.weights.is_dir() else "not found"
            raise InputError(f"weights file {network.weights} {problem}. Paths are relative to the working directory.")
    channels = data.train.channels if data else recipe.data.channels
    known = model is None and recipe.model.num_classes
    early = _build(recipe.model, None, recipe.seed, channels, progress) if known else None
    progress.say("reading images")
    task = recipe.task.build()
    splits = data or load(
        seed=recipe.seed, targets="boxes" if task.boxes else "masks", **recipe.data.model_dump(exclude={"augment"})
    )
    _check_targets(task, splits)
    if recipe.target.input == "uint8" and splits.train.largest > 255:
        raise InputError(
            "the images have 16 bits per channel, and target.input is uint8. Write target.input: normalized, or "
            "convert the images to 8 bits."
        )
    _say_what_the_data_lacks(splits, progress)
    if model is not None:
        network, metadata = _plain(model, "model", progress), dict[str, str]()
    else:
        network, metadata = early or _build(recipe.model, splits, recipe.seed, channels, progress)
    given, (teacher, of_teacher) = teacher, _teacher(recipe, network, splits, teacher)
    named_teacher = None if given else recipe.teacher
    for whose, named in (("the model", None if model else recipe.model), ("the teacher", named_teacher)):
        _say_unused_classes(whose, named, progress)
    splits, computed = _normalised(splits, recipe, (metadata, of_teacher), progress, own_mean=own_mean)
    experiment = Experiment(
        recipe,
        task,
        network,
        teacher,
        splits,
        model_is_trained=model is not None or recipe.model.weights is not None,
        teacher_is_trained=not isinstance(named_teacher, Teacher) or named_teacher.weights is not None,
    )
    for whose, of_file in ((recipe.model.name, metadata), ("the teacher", of_teacher)):
        if "taken" in of_file:
            progress.say(f"weights of {whose}: {of_file['taken']}")
    check_networks(experiment, progress, mean_is_computed=computed)
    if any(map(experiment.steps_of, recipe.stages)) or not experiment.teacher_is_trained:
        progress.say(f"augmentation of the training images: {described_augmentation(recipe.data.augment)}")
    _rehearse(experiment, progress)
    return experiment


def _rehearse(experiment: Experiment, progress: ProgressReporter) -> None:
    """Attach every stage to a copy with few images, so that a wrong parameter fails now and not after an hour.

    The losses are computed once, for the same reason.
    """
    data = replace(experiment.data, train=few_of(experiment, _FEW))
    rehearsal = replace(experiment, data=data, latency=macs_ratio)
    model = copy.deepcopy(experiment.model)
    wanted = experiment.recipe.teacher
    if isinstance(wanted, Teacher) and not experiment.teacher_is_trained:
        batches = experiment.training_batches(wanted.training)
        learning_rates(batches, wanted.training, wanted.epochs * steps_per_epoch(batches, wanted.training))
    for stage in experiment.recipe.stages:
        if stage.validate_every and not len(experiment.data.validation):
            raise InputError(
                f"stage '{stage.name}' has validate_every, and there are no validation images. Write data.validation, "
                "the fraction of the training images to hold out, or remove validate_every."
            )
        learning_rates(experiment.training_batches(stage), stage, experiment.steps_of(stage))
        attachment = attach(rehearsal, stage, model, progress)
        model = attachment.model
        check_losses(experiment, rehearsal, stage, attachment)
        structure(model)  # what cannot be saved fails now


def _check_targets(task: Task, splits: Splits) -> None:
    if not task.from_original and splits.test.targets is None:
        raise InputError(
            f"the images have no targets, and {tasks.name_of(task)} needs them for its loss and for {task.metric}. "
            "Give targets. In a recipe, task: distance compares the outputs with those of the original instead."
        )
    if isinstance(task, Classification) and class_numbers(splits.test) is None:
        raise InputError(
            "the targets of the images are not class indices. Write the task that they belong to, such as task: "
            f"segmentation in a recipe or --task segmentation. Possible: {', '.join(tasks.NAMES)}, package.module:Task."
        )


def _say_what_the_data_lacks(splits: Splits, progress: ProgressReporter) -> None:
    if drawn := drawn_test_set(splits):
        progress.say(drawn)
    labels = class_numbers(splits.train)
    if labels is None:
        return
    present = set(labels.unique().tolist())
    missing = [str(number) for number in range(len(splits.classes)) if number not in present]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        progress.say(f"warning: no training image for {len(missing)} of {len(splits.classes)} classes: {shown}")


def _say_unused_classes(whose: str, network: object, progress: ProgressReporter) -> None:
    if isinstance(network, Network) and network.num_classes and models.ignores_num_classes(network.name):
        progress.say(
            f"warning: num_classes: {network.num_classes} of {whose} is not used, because '{network.name}' has no "
            "argument num_classes. Add the argument, or remove num_classes."
        )


Built = tuple[nn.Module, dict[str, str]]


def _plain(network: nn.Module, name: str, progress: ProgressReporter) -> nn.Module:
    for note in folding_notes(network):
        progress.say(note)
    return plain_copy(network, name)


def _build(network: Network, splits: Splits | None, seed: int, channels: int, progress: ProgressReporter) -> Built:
    """The network; without a weights file, its random weights depend on `seed` alone."""
    classes = network.num_classes or (len(splits.classes) if splits and splits.classes else None)
    with seeded(seed):
        built = _plain(models.build(network.name, classes, channels=channels), network.name, progress)
    if not network.weights:
        return built, {}
    try:
        return built, models.load_weights(built, network.weights)
    except models.OtherClasses as error:
        if splits and error.in_file == len(splits.classes) - 1:
            refuse_labels_from_one(splits, f"'{network.weights}'")
        raise


def _teacher(
    recipe: Recipe, model: nn.Module, splits: Splits, given: nn.Module | None
) -> tuple[nn.Module | None, dict[str, str]]:
    """The teacher, and the metadata of its weights file."""
    if recipe.teacher is None and given is not None:
        raise InputError(
            "a teacher was passed, but the recipe has no teacher entry to replace. Add one, such as teacher: original; "
            "the network that you passed is used in its place."
        )
    if recipe.teacher is None:
        return None, {}
    if given is not None:
        return plain_copy(given, "the teacher"), {}
    if isinstance(recipe.teacher, str):
        return copy.deepcopy(model).eval(), {}
    built, metadata = _build(recipe.teacher, splits, recipe.seed, splits.train.channels, NO_PROGRESS)
    return plain_copy(built, "the teacher"), metadata


def _normalised(
    splits: Splits, recipe: Recipe, metadata: Sequence[dict[str, str]], progress: ProgressReporter, *, own_mean: bool
) -> tuple[Splits, bool]:
    """The images with mean and standard deviation from the recipe, else the weights files, else the data.

    The second value is whether they were computed from the training images.
    """
    told = list(dict.fromkeys(found for found in map(models.normalization, metadata) if found is not None))
    given = recipe.data.mean is not None
    if len(told) > 1 and not given:
        raise InputError(
            f"model and teacher were trained with different means and standard deviations: {told[0]} and {told[1]}. "
            "Both get the same images. Write data.mean and data.std to choose one normalization."
        )
    weights, computed = recipe.model.weights, False
    if given:
        source = "given"
    elif told:
        splits, source = replace(splits, mean=told[0][0], std=told[0][1]), "from the weights file"
    else:
        computed = not own_mean and not (recipe.data.name is not None and is_function_path(recipe.data.name))
        source = "computed from the training images" if computed else "from the data"
        source += f"; {weights.name} has none" if weights else ""
    progress.say(normalization_line(splits.mean or (), splits.std or (), source))
    return splits, computed
