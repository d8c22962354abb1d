"""Shared by benchmarks that train: one stage on CIFAR-10 that resumes after an interruption."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from images import SHARED, cifar, folder
from tersor.checkpoint.store import Checkpoints
from tersor.core.progress import NullProgress
from tersor.data import Splits
from tersor.evaluation.scoring import network_score
from tersor.pipeline.experiment import EVALUATION_BATCH, Experiment
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages
from tersor.recipe import Recipe, write

Numbers = dict[str, Any]


def weights_of(network: str) -> Path:
    """Return the weights file of a trained network."""
    return SHARED / "models" / f"{network}-cifar10-jpeg.safetensors"


def recipe(
    stage: Mapping[str, Any],
    *,
    network: str = "resnet20",
    scratch: bool = False,
    teacher: str | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Recipe:
    """Return one stage of training on augmented images, from a trained network or from `scratch`."""
    weights = {} if scratch else {"weights": weights_of(network)}
    return Recipe.model_validate(
        {
            "model": {"name": network, "num_classes": 10, **weights},
            "teacher": teacher,
            "data": {"folder": folder(), "augment": "crop_flip"},
            "seed": seed,
            "stages": [{"name": "train", **stage}],
        }
    )


def walked(
    given: Recipe,
    result: str,
    images: Splits | None = None,
    *,
    prepared: Callable[[Experiment], Experiment] = lambda experiment: experiment,
) -> tuple[Experiment, Numbers]:
    """Run a recipe of one stage; return the experiment at its end and the stage's metrics.

    Args:
        given: the recipe; after an interruption it continues from its last checkpoint.
        result: the file of results that it belongs to.
        images: all images by default.
        prepared: changes the experiment before its first step.
    """
    experiment = prepared(prepare(given, model=None, data=images or cifar(), progress=NullProgress()))
    kept = folder().parent / result / hashlib.sha256(write(given).encode()).hexdigest()[:16]
    model, (record,) = run_stages(experiment, Checkpoints(kept), NullProgress())
    shutil.rmtree(kept)
    return replace(experiment, model=model), record.model_dump(exclude_unset=True)


def accuracy_on_test(experiment: Experiment) -> float:
    """Return the test accuracy on 10,000 images in percent, computed in torch."""
    return network_score(experiment.model, experiment.batches(experiment.data.test, EVALUATION_BATCH))
