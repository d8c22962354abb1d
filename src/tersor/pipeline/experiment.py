"""What a recipe describes: networks and data, loaded and checked. Immutable: stages take a model and return another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from tersor.core import distributed
from tersor.data import Batches, Images, Splits
from tersor.evaluation.latency_ratio import latency_ratio
from tersor.evaluation.scoring import images_at_once
from tersor.recipe import Recipe, Stage
from tersor.tasks.task import Task
from tersor.training.context import LatencyRatio
from tersor.training.options import Training
from tersor.training.schedule import steps_per_epoch

EVALUATION_BATCH = 500
_EXAMPLE_IMAGES = 8


@dataclass(frozen=True)
class Experiment:
    """Networks and data of a recipe.

    Attributes:
        recipe: the checked recipe.
        task: the task of the networks.
        model: the network before the first stage. Stages change copies of it.
        teacher: the network to learn from.
        data: training, validation and test images.
        model_is_trained: whether `model` came with weights.
        teacher_is_trained: whether `teacher` came with weights.
        latency: measures latency, for methods with a latency budget.
    """

    recipe: Recipe
    task: Task
    model: nn.Module
    teacher: nn.Module | None
    data: Splits
    model_is_trained: bool
    teacher_is_trained: bool
    latency: LatencyRatio = latency_ratio

    @property
    def original(self) -> nn.Module:
        """The network that the artifact is compared with: the model, or the teacher if the model has no weights."""
        return self.model if self.model_is_trained or self.teacher is None else self.teacher

    @cached_property
    def example(self) -> Tensor:
        """A few training images (N, C, H, W), normalized."""
        return next(iter(self.batches(self.data.train, _EXAMPLE_IMAGES))).only_images.contiguous()

    @property
    def evaluation_batch(self) -> int:
        """Images per batch of a measurement."""
        return images_at_once(self.task, self.data.test.size)

    def batches(self, images: Images, batch_size: int, **options: Any) -> Batches:
        """Batches, normalized as the networks were trained."""
        assert self.data.mean is not None
        assert self.data.std is not None
        return Batches(images, batch_size, mean=self.data.mean, std=self.data.std, **options)

    def training_batches(self, training: Training) -> Batches:
        """This process's share of the training images, shuffled and augmented."""
        options = {"shuffle": True, "seed": self.recipe.seed, "augment": self.recipe.data.augment}
        share = {"rank": distributed.rank(), "world": distributed.count()}
        return self.batches(self.data.train, training.batch_size, **options, **share)

    def steps_of(self, stage: Stage) -> int:
        """Optimizer steps of a stage."""
        return stage.steps or stage.epochs * steps_per_epoch(self.training_batches(stage), stage)

    def starts_trained(self, stage: Stage) -> bool:
        """Whether the weights at the start of a stage are trained: from a file, or by an earlier stage."""
        stages = self.recipe.stages
        return self.model_is_trained or any(self.steps_of(earlier) for earlier in stages[: stages.index(stage)])
