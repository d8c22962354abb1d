"""The training of a candidate, as a stage of a recipe: losses, optimizer and learning rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS
from tersor.graph.feature_extraction import last_feature_maps
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.stages import attach
from tersor.recipe import Stage
from tersor.search.candidate import QUANTIZE
from tersor.training.options import LearningRateSchedule, OptimizerOptions
from tersor.training.schedule import steps_per_epoch

_SOFT_TARGETS: dict[str, Any] = {"soft_targets": {"temperature": 4.0, "loss_weight": 0.9, "label_weight": 0.1}}
_SAME_CHANNELS: dict[str, Any] = {"fitnet": {"loss_weight": 3.0, "regressor": False}}
_OTHER_CHANNELS: dict[str, Any] = {"fitnet": {"loss_weight": 3.0}}
_INHERITED_RATE, _FRESH_RATE, _QUANTIZED_RATE = 0.02, 0.1, 0.002
_ADAM_SHARE = 0.02
"""Learning rate of AdamW relative to that of SGD."""
_SETTLED = 0.4
"""Factor applied to the learning rate of a training run that is shorter than an earlier one, whose gains the full
learning rate would undo."""
_FEWEST_BATCHES = 8
"""With few images, the batch size is reduced so that an epoch has at least this many batches."""
_WARMUP = 0.1


def training_stage(
    experiment: Experiment, name: str, steps: int, model: nn.Module, *, fresh: bool, settled: bool
) -> Stage:
    """A training stage with soft targets, and with a feature loss if the networks have feature maps.

    The feature loss compares a network that inherits weights with the original at every resolution, as in
    `recipes/cifar10-resnet56.yaml`, and any other network at the last resolution only.

    Args:
        experiment: the experiment of the candidate.
        name: name of the stage; the stage `quantize` trains with learned step sizes (LSQ).
        steps: largest number of optimizer steps.
        model: the network as it enters the stage.
        fresh: whether it started from random weights.
        settled: whether earlier training runs were longer than this one.
    """
    quantizes = name == QUANTIZE
    rate = _QUANTIZED_RATE if quantizes else _FRESH_RATE if fresh else _INHERITED_RATE
    rate *= _SETTLED if settled else 1
    adam = not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())  # pyright: ignore[reportPrivateUsage]
    options: dict[str, Any] = {
        "name": name,
        "steps": steps,
        "batch_size": max(2, min(128, len(experiment.data.train) // _FEWEST_BATCHES)),
        "optimizer": OptimizerOptions(name="adamw", learning_rate=_ADAM_SHARE * rate, weight_decay=0.05)
        if adam
        else OptimizerOptions(learning_rate=rate),
    }
    if quantizes:
        return _attachable(experiment, model, options, ({"lsq": {}},), ((_SOFT_TARGETS,), ()))
    if fresh:
        epoch = steps_per_epoch(experiment.training_batches(Stage(**options)), Stage(**options))
        options["lr_schedule"] = LearningRateSchedule(warmup_epochs=round(_WARMUP * steps / epoch, 3))
    features = [] if fresh else _every_resolution(experiment, model)
    features += [(_SAME_CHANNELS,), (_OTHER_CHANNELS,), ()]
    taught = [(*soft, *each) for soft in ((_SOFT_TARGETS,), ()) for each in features]
    return _attachable(experiment, model, options, (), taught)


def _every_resolution(experiment: Experiment, model: nn.Module) -> list[tuple[dict[str, Any], ...]]:
    """Feature losses for the last layer at each resolution, where both networks have the same number of resolutions."""
    images = next(iter(experiment.batches(experiment.data.train, 2))).images
    try:
        ours, theirs = (
            last_feature_maps(network, images) for network in (model, experiment.teacher) if network is not None
        )
    except InputError:
        return []
    if len(ours) != len(theirs) or len(ours) < 2:
        return []
    layers = {"layers": list(ours), "teacher_layers": list(theirs)}
    return [({"fitnet": {**each["fitnet"], **layers}},) for each in (_SAME_CHANNELS, _OTHER_CHANNELS)]


def _attachable(
    experiment: Experiment,
    model: nn.Module,
    options: dict[str, Any],
    methods: tuple[dict[str, Any], ...],
    more: Sequence[tuple[dict[str, Any], ...]],
) -> Stage:
    """The stage with the first loss in `more` that fits the networks and the task."""
    for losses in more[:-1]:
        stage = Stage(**options, methods=(*methods, *losses))
        try:
            attach(experiment, stage, copy.deepcopy(model), NO_PROGRESS)
        except InputError:
            continue
        return stage
    return Stage(**options, methods=(*methods, *more[-1]))


def as_made(stage: Stage, steps: int) -> Stage:
    """The stage with the number of steps that were done; the warm-up keeps its share of the steps."""
    schedule = stage.lr_schedule
    warmup = math.floor(1000 * schedule.warmup_epochs * steps / stage.steps) / 1000
    return stage.model_copy(
        update={"steps": steps, "lr_schedule": schedule.model_copy(update={"warmup_epochs": warmup})}
    )
