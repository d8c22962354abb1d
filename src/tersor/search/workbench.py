"""Builds, trains, quantizes and exports candidates with the stages of recipes; everything has its checkpoint."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tersor import models
from tersor.checkpoint.store import Checkpoints
from tersor.core.device import seeded
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.data import Batches, Splits, load
from tersor.data.splitting import joined, with_test_images_for_validation
from tersor.deploy.onnx import export
from tersor.deploy.static_batch import batch_for
from tersor.evaluation.costs import costs
from tersor.evaluation.latency import Array
from tersor.evaluation.results import StageRecord
from tersor.evaluation.scoring import targets_of
from tersor.evaluation.unsupported_quantizers import remove_unsupported_quantizers
from tersor.graph.batchnorm import Norm
from tersor.graph.capture import capture
from tersor.graph.plain_network import plain_copy
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.stages import attach, run_stages
from tersor.pruning.residual_branches import cost_shares, find_branches
from tersor.recipe import Network, Recipe, Stage, Teacher
from tersor.search import search_metric
from tersor.search.candidate import Candidate
from tersor.search.search_metric import Measured
from tersor.search.training_stage import training_stage
from tersor.tasks.classification import Classification
from tersor.training.loop import fit
from tersor.training.precision import with_usable_precision


@dataclass(frozen=True)
class Exported:
    """An exported candidate: its file, its metric on the validation images, and its costs.

    `right` says whether the class of each validation image is right (N,); None if the metric is not the accuracy.
    """

    file: Path
    validation: float
    macs: int
    bytes: int
    right: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Workbench:
    """Everything that candidates share.

    Attributes:
        experiment: the original as model and as teacher, with the data.
        students: networks that replace the original, by name, with their weights files.
        folder: holds the checkpoints of each candidate.
        progress: receives the progress of every stage.
        checkpoint_every: steps between two checkpoints of a training run.
        tests_choose: whether half of the test images are used for validation.
    """

    experiment: Experiment
    students: Mapping[str, Path | None]
    folder: Path
    progress: ProgressReporter
    checkpoint_every: int = 200
    tests_choose: bool = False

    def choosing_on_test_images(self) -> Workbench:
        """Return a workbench that validates on half of the test images of each class, and tests on the other half.

        The held-out images then become training images, unless the number of training images is limited: the recipes
        of such a search hold out no images.
        """
        recipe, data = self.experiment.recipe, self.experiment.data
        train = None if recipe.data.limit else joined(data.train, data.validation)
        if train is not None:
            source = recipe.data.model_copy(update={"validation": 0.0, "mean": data.mean, "std": data.std})
            recipe = recipe.model_copy(update={"data": source})
        halves = replace(self._with_halves(data), train=train or data.train)
        return replace(self, experiment=replace(self.experiment, recipe=recipe, data=halves), tests_choose=True)

    def _with_halves(self, data: Splits) -> Splits:
        """The data with half of the test images for validation, and the other half for tests."""
        by_class = isinstance(self.experiment.task, Classification)
        return with_test_images_for_validation(data, self.experiment.recipe.seed, by_class=by_class)

    @cached_property
    def validation(self) -> Batches:
        """Validation images in batches; the training images where there are none."""
        return self._chosen_by(self.experiment)

    @cached_property
    def _resized(self) -> dict[int, Splits]:
        return {}

    def experiment_of(self, candidate: Candidate, stages: Sequence[Stage]) -> Experiment:
        """The experiment of one candidate.

        Raises:
            InputError: the student cannot be built, or the images cannot be resized.
        """
        base = self.experiment
        made = replace(base, recipe=self.recipe(candidate, stages), data=self._data(candidate.pixels))
        if candidate.inherits:
            return made
        trained = self.students[candidate.network] is not None
        return replace(made, model=self.student(candidate.network), model_is_trained=trained)

    def recipe(self, candidate: Candidate, stages: Sequence[Stage]) -> Recipe:
        """The recipe of a candidate, which `tersor run` accepts."""
        recipe = self.experiment.recipe
        changed: dict[str, Any] = {"stages": tuple(stages)}
        if candidate.pixels is not None:
            changed["data"] = recipe.data.model_copy(update={"image_size": candidate.pixels})
        if not candidate.inherits:
            original = recipe.model
            changed["model"] = Network(name=candidate.network, weights=self.students[candidate.network])
            changed["teacher"] = Teacher(**original.model_dump())
        return recipe.model_copy(update=changed)

    def build(self, candidate: Candidate, trained: Sequence[Stage] = ()) -> nn.Module:
        """The network after the stages `trained`, with least-squares reconstruction of what was removed.

        Training stages come from their checkpoints.

        Raises:
            InputError: it cannot be built or pruned.
        """
        if stages := (*candidate.removal, *trained):
            return self._run(candidate, stages, None)[0]
        return copy.deepcopy(self.experiment_of(candidate, (candidate.rounding,)).model)

    def branches(self, candidate: Candidate, trained: Sequence[Stage] = ()) -> list[float]:
        """The shares of the MACs of the residual branches that can be removed after the stages `trained`.

        Raises:
            InputError: the network cannot be captured.
        """
        images = next(iter(self.validation_of(self.experiment_of(candidate, trained)))).images[:2]
        graph = capture(self.build(candidate, trained), images)
        return cost_shares(graph, find_branches(graph, images), images, parameters=False)

    def start_from(self, candidate: Candidate, parent: Candidate) -> None:
        """Copy the checkpoints of `parent`, unless the candidate has its own already."""
        folder, source = self.folder / candidate.name, self.folder / parent.name
        if not folder.exists() and source.exists():
            partial = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.rename(folder)

    def train(self, candidate: Candidate, trained: Sequence[Stage], seconds: float) -> tuple[nn.Module, StageRecord]:
        """Train for `seconds` in the last of the stages `trained`; earlier ones come from their checkpoints.

        If a stage of another name has a checkpoint under the same number, that checkpoint is deleted.

        Returns:
            The network, and the record of the last stage.

        Raises:
            InputError: the training diverged, or a stage cannot be attached.
        """
        return self._run(candidate, (*candidate.removal, *trained), seconds)

    def export(self, candidate: Candidate, model: nn.Module, file: Path, *, quantized: bool = False) -> Exported:
        """Quantize a copy of `model` unless it is `quantized`, write it, and measure its metric.

        Raises:
            InputError: it cannot be quantized or exported, or its runtime cannot run it.
        """
        experiment = self.experiment_of(candidate, (candidate.rounding,))
        if not quantized:
            attachment = attach(experiment, candidate.rounding, copy.deepcopy(model), NO_PROGRESS)
            attachment.begin()
            attachment.finish()
            model = attachment.model
        return self.write(experiment, model, file)

    def write(self, experiment: Experiment, model: nn.Module, file: Path) -> Exported:
        """Write a network as it is, and measure its metric.

        Raises:
            InputError: it cannot be exported, or its runtime cannot run it.
        """
        data, target = experiment.data, experiment.recipe.target
        validation = self.validation_of(experiment)
        images = next(iter(validation)).images
        example = images[:1]
        assert data.mean is not None
        assert data.std is not None
        batch = batch_for(model, target)
        export(model, example, file, classes=data.classes, normalization=(data.mean, data.std), batch=batch)
        remove_unsupported_quantizers(file, target.runtime, images)
        measured = search_metric.of_file(file, target.runtime, validation, experiment)
        return Exported(file, measured.metric, costs(model, example).macs, file.stat().st_size, measured.right)

    def measured(self, file: Path, runtime: str, precision: str | None = None) -> Measured:
        """The metric of a file of the original on the validation images."""
        return search_metric.of_file(file, runtime, self.validation, self.experiment, precision)

    def test_metric(self, candidate: Candidate, file: Path) -> float:
        """The metric of a candidate's file on the test images."""
        return search_metric.measured(self.experiment.task, *self.test_predictions(candidate, file)).metric

    def test_predictions(self, candidate: Candidate, file: Path) -> tuple[Any, Any]:
        """The predictions of a candidate's file for the test images, and the targets."""
        experiment = self.experiment_of(candidate, (candidate.rounding,))
        test = experiment.batches(experiment.data.test, experiment.evaluation_batch)
        runtime = experiment.recipe.target.runtime
        return search_metric.predictions_of(file, runtime, test, experiment), targets_of(test)

    def example(self, candidate: Candidate) -> Array:
        """One image (1, C, H, W) of a candidate's size."""
        experiment = self.experiment_of(candidate, (candidate.rounding,))
        return next(iter(self.validation_of(experiment))).only_images[:1].numpy()

    def validation_of(self, experiment: Experiment) -> Batches:
        """The validation images of an experiment, in batches."""
        if experiment.data is self.experiment.data:
            return self.validation
        return self._chosen_by(experiment)

    @staticmethod
    def _chosen_by(experiment: Experiment) -> Batches:
        data = experiment.data
        return experiment.batches(data.validation if len(data.validation) else data.train, experiment.evaluation_batch)

    def pace(self, model: nn.Module, steps: int) -> float:
        """Seconds of one training step of the original, after a first one that loads libraries and kernels.

        Raises:
            InputError: it cannot be trained.
        """
        candidate, network = Candidate(), copy.deepcopy(model)
        for norm in network.modules():
            if isinstance(norm, Norm):
                norm.momentum = None  # statistics that are an average are not averaged again after the training
        stage = self.stage(candidate, "pace", steps, model)
        experiment = self.experiment_of(candidate, (stage,))
        teacher = experiment.teacher
        networks = {"the original": network, "the teacher": teacher}
        stage = with_usable_precision(stage, networks, experiment.example, self.progress.say)
        batches, seconds = experiment.training_batches(stage), 0.0
        for count in (1, steps):
            attachment = attach(experiment, stage, copy.deepcopy(network), NO_PROGRESS)
            options: dict[str, Any] = {"teacher": teacher, "task": experiment.task, "origin": "search"}
            seconds = fit(attachment, batches, stage, steps=count, **options).seconds
        return seconds / steps

    def stage(self, candidate: Candidate, name: str, steps: int, model: nn.Module, *, settled: bool = False) -> Stage:
        """A training stage for a candidate; see `training_stage`."""
        experiment = self.experiment_of(candidate, (candidate.rounding,))
        fresh = not candidate.inherits and self.students[candidate.network] is None
        return training_stage(experiment, name, steps, model, fresh=fresh, settled=settled)

    def student(self, name: str) -> nn.Module:
        """Build a student, with its weights if there is a file; an `InputError` says why it cannot be built."""
        weights = self.students[name]
        with seeded(self.experiment.recipe.seed):
            data = self.experiment.data
            built = plain_copy(models.build(name, len(data.classes), channels=data.train.channels), name)
        if weights is not None:
            models.load_weights(built, weights)
        return built

    def _run(
        self, candidate: Candidate, stages: Sequence[Stage], seconds: float | None
    ) -> tuple[nn.Module, StageRecord]:
        checkpoints = Checkpoints(self.folder / candidate.name)
        with checkpoints.held(str(replace(candidate, later=())), resume=True):
            checkpoints.remove_renamed([stage.name for stage in stages])
            experiment = self.experiment_of(candidate, stages)
            recipe = experiment.recipe.model_copy(update={"checkpoint_every": self.checkpoint_every})
            experiment = replace(experiment, recipe=recipe)
            model, records = run_stages(experiment, checkpoints, self.progress, seconds, validate_all=False)
        return model, records[-1]

    def _data(self, pixels: int | None) -> Splits:
        if pixels is None:
            return self.experiment.data
        if pixels not in self._resized:
            recipe, data = self.experiment.recipe, self.experiment.data
            source = recipe.data.model_dump(exclude={"augment", "mean", "std", "image_size"})
            loaded = load(seed=recipe.seed, **source, image_size=pixels, mean=data.mean, std=data.std)
            self._resized[pixels] = self._with_halves(loaded) if self.tests_choose else loaded
        return self._resized[pixels]
