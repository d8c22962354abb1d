"""Networks and images of a recipe, and how they go through its stages."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tersor.checkpoint.store import Checkpoints, StageCheckpointer
from tersor.checkpoint.structure import rebuild, structure
from tersor.core import distributed
from tersor.core.device import precision_for
from tersor.core.progress import Progress, ProgressReporter
from tersor.data import Batches, Images, Splits
from tersor.evaluation.costs import accuracy
from tersor.evaluation.latency_protocol import Stopwatch
from tersor.evaluation.latency_ratio import RuntimeStopwatch
from tersor.graph.fused_inference import fused
from tersor.recipe import Recipe, Stage, Teacher
from tersor.training.accuracy_curve import AccuracyCurve
from tersor.training.attachment import Attachment
from tersor.training.loop import fit, steps_per_epoch
from tersor.training.method import chain
from tersor.training.options import Training
from tersor.training.snapshot import fitting

EVALUATION_BATCH = 500
_CALIBRATION_BATCH = 64
_TRIED_ON = 8
_TEACHER = 0
"""The unit of a run that the teacher is; the stages are counted from 1."""


@dataclass
class Experiment:
    """Networks and images of a recipe, as far as they have come."""

    recipe: Recipe
    model: nn.Module
    teacher: nn.Module | None
    data: Splits
    model_is_trained: bool
    teacher_is_trained: bool
    stopwatch: Stopwatch = field(default_factory=RuntimeStopwatch)

    def __post_init__(self) -> None:
        self.initial_model = copy.deepcopy(self.model)

    @property
    def original(self) -> nn.Module:
        """What the artifact is compared with: the model as it came in, or the teacher of one without weights."""
        return self.model if self.model_is_trained or self.teacher is None else self.teacher

    def batches(self, images: Images, batch_size: int, **options: Any) -> Batches:
        """Batches, normalised as the networks were trained."""
        assert self.data.mean is not None
        assert self.data.std is not None
        return Batches(images, batch_size, mean=self.data.mean, std=self.data.std, **options)

    def training_batches(self, training: Training) -> Batches:
        """This process's share, shuffled and augmented as the recipe says."""
        options = {"shuffle": True, "seed": self.recipe.seed, "augment": self.recipe.data.augment}
        share = {"rank": distributed.rank(), "world": distributed.count()}
        return self.batches(self.data.train, training.batch_size, **options, **share)

    def train_teacher(self, watch: ProgressReporter, checkpoints: Checkpoints) -> None:
        """Trains a teacher that came without weights, on the labels alone."""
        wanted = self.recipe.teacher
        if self.teacher is None or self.teacher_is_trained or not isinstance(wanted, Teacher):
            return
        ended = checkpoints.end_of(_TEACHER)
        if ended is not None:
            with fitting(str(ended.path)):
                self.teacher.load_state_dict(ended.network())
            watch.say("teacher: as it was trained before")
            return
        batches = self.training_batches(wanted.training)
        steps = wanted.epochs * steps_per_epoch(batches, wanted.training)
        keeper = StageCheckpointer(checkpoints, _TEACHER, "teacher", self.recipe.checkpoint_every, {})
        attachment = Attachment(self.teacher)
        fit(
            attachment,
            batches,
            wanted.training,
            steps=steps,
            watch=watch,
            seed=self.recipe.seed,
            task="teacher",
            keeper=keeper,
        )
        self.validate(self.teacher, "teacher", watch)
        _save_end(checkpoints, _TEACHER, "teacher", steps, self.teacher, {}, {})

    def stages(self, watch: ProgressReporter, checkpoints: Checkpoints) -> list[dict[str, Any]]:
        """All stages, from where the checkpoints leave off; what each was, for `numbers.json`."""
        told: list[dict[str, Any]] = []
        numbers = range(len(self.recipe.stages), 0, -1)
        end = next((end for end in map(checkpoints.end_of, numbers) if end is not None), None)
        latest = 0 if end is None else end.unit
        if end is not None:
            with fitting(str(end.path)):
                self.model = rebuild(self.model, end.structure())
                self.model.load_state_dict(end.network())
                told = end.stages
            watch.say(f"{self.recipe.stages[latest - 1].name}: as it ended before")
        for number, stage in enumerate(self.recipe.stages[latest:], latest + 1):
            found, kept = self._stage(number, stage, watch, checkpoints)
            told.append(found)
            _save_end(checkpoints, number, stage.name, found["steps"], self.model, {"stages": told}, kept)
        return told

    def _stage(
        self, number: int, stage: Stage, watch: ProgressReporter, checkpoints: Checkpoints
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attaches, begins, trains, finishes: what is told of it, and what is kept.

        What attaching decides follows from the weights that it finds, which are those of the stage before: a stage
        that goes on attaches again and takes its own weights back.
        """
        began = time.perf_counter()
        distributed.broadcast_from_rank0(self.model)
        batches = self.training_batches(stage)
        steps = stage.steps or stage.epochs * steps_per_epoch(batches, stage)
        attachment = self.attach(stage, steps, watch)
        said = attachment.notes
        for note in said:
            watch.say(f"{stage.name}: {note}")
        keeper = StageCheckpointer(
            checkpoints, number, stage.name, self.recipe.checkpoint_every, structure(attachment.model)
        )
        if keeper.resume_state is None:
            _begin(attachment, stage.name, watch, keeper)
            for note in (note for note in attachment.notes if note not in said):
                watch.say(f"{stage.name}: {note}")
            for module in (attachment.model, *attachment.terms):
                distributed.broadcast_from_rank0(module)
            keeper.notes = attachment.notes
        self.model = attachment.model
        told: dict[str, Any] = {"name": stage.name, "methods": stage.model_dump(mode="json")["methods"]}
        told |= {"steps": steps, "notes": list(keeper.notes)}
        earlier = 0.0
        if steps:
            found, earlier = self._train(stage, attachment, batches, steps, watch, keeper)
            told |= found
        attachment.finish()
        told |= attachment.metrics
        told["minutes"] = (time.perf_counter() - began + earlier) / 60
        told["validation_accuracy"] = self.validate(self.model, stage.name, watch)
        return told, attachment.extra_state

    def _train(
        self,
        stage: Stage,
        attachment: Attachment,
        batches: Batches,
        steps: int,
        watch: ProgressReporter,
        keeper: StageCheckpointer,
    ) -> tuple[dict[str, Any], float]:
        """What is told of the training, and the seconds that processes before this one took."""
        curve = self._curve(stage, batches)
        fitted = fit(
            attachment,
            batches,
            stage,
            steps=steps,
            teacher=self._asked(stage, attachment),
            watch=watch,
            seed=self.recipe.seed,
            task=stage.name,
            keeper=keeper,
            once=self.batches(self.data.train, EVALUATION_BATCH) if stage.cache else None,
            curve=curve,
        )
        told = {"losses": fitted.losses, "precision": fitted.precision, "training_seconds": fitted.seconds}
        if curve is not None:
            told |= {"validation_by_epoch": curve.values, "validated_at": curve.steps}
        return told, fitted.earlier

    def _asked(self, stage: Stage, attachment: Attachment) -> nn.Module | None:
        """The teacher, in a form that answers fast."""
        if self.teacher is None or not attachment.terms:
            return self.teacher
        few = next(iter(self.batches(self.data.train, _TRIED_ON))).images.contiguous()
        precision = precision_for(few.device, stage.precision)
        return fused(self.teacher, few, [path for _, path in attachment.layers], precision)

    def _curve(self, stage: Stage, batches: Batches) -> AccuracyCurve | None:
        """Accuracy on the validation images every few epochs, where the stage asks for it."""
        if stage.validate_every is None:
            return None
        validation = self.batches(self.data.validation, EVALUATION_BATCH)
        every = stage.validate_every * steps_per_epoch(batches, stage)
        return AccuracyCurve(every, lambda network: accuracy(network, validation))

    def stage_models(self, checkpoints: Checkpoints) -> dict[int, nn.Module]:
        """Number of a stage -> the network as it left it, from the checkpoints at their ends."""
        networks: dict[int, nn.Module] = {}
        for end in checkpoints.ends():
            if end.unit != _TEACHER:
                with fitting(str(end.path)):
                    network = rebuild(copy.deepcopy(self.initial_model), end.structure())
                    network.load_state_dict(end.network())
                networks[end.unit] = network.eval()
        return networks

    def attach(self, stage: Stage, steps: int, watch: ProgressReporter) -> Attachment:
        """The stage's methods, laid on the model."""
        calibration = self.batches(self.data.train, _CALIBRATION_BATCH, shuffle=True, seed=self.recipe.seed)
        return chain(
            stage.methods,
            self.model,
            data=calibration,
            teacher=self.teacher,
            steps=steps,
            target=self.recipe.target,
            stopwatch=self.stopwatch,
            tell=_Bar(stage.name, watch),
        )

    def validate(self, network: nn.Module, name: str, watch: ProgressReporter) -> float | None:
        """Percent of right answers on the images that no training has seen; None where none are held out, and in all
        processes but the first.
        """
        if distributed.rank():
            return None
        if not len(self.data.validation):
            watch.say(f"{name}: done (no validation images: data.validation is 0)")
            return None
        percent = accuracy(network, self.batches(self.data.validation, EVALUATION_BATCH))
        watch.say(f"{name}: {percent:.2f} % on {len(self.data.validation)} validation images")
        return percent


def _save_end(
    checkpoints: Checkpoints,
    unit: int,
    name: str,
    steps: int,
    network: nn.Module,
    told: dict[str, Any],
    kept: dict[str, Tensor],
) -> None:
    if distributed.rank():
        return
    tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"kept.{key}": value for key, value in kept.items()}
    checkpoints.save(unit, name, step=steps, done=True, tensors=tensors, structure=structure(network), told=told)


class _Bar:
    """Draws what is told of work before the first step: a bar for each kind of it.

    Args:
        task: the stage's name.
        watch: who draws.
    """

    def __init__(self, task: str, watch: ProgressReporter) -> None:
        self._task, self._watch = task, watch
        self._what, self._done = "", 0

    def __call__(self, progress: Progress) -> None:
        """Moves it."""
        if progress.what != self._what:
            self._watch.start(f"{self._task}: {progress.what}", progress.total)
            self._what, self._done = progress.what, 0
        self._watch.advance(progress.done - self._done)
        self._done = progress.done


def _begin(attachment: Attachment, task: str, watch: ProgressReporter, keeper: StageCheckpointer) -> None:
    if keeper.setup_state is not None:
        with fitting(keeper.last):
            attachment.model.load_state_dict(keeper.setup_state)
        watch.say(f"{task}: goes on where it was left")
    tell = _Bar(task, watch)
    for progress in attachment.begin():
        tell(progress)
        if progress.resumable:
            keeper.keep_before_the_first(attachment.model)
