"""The stages of a recipe: each takes a model and returns a StageResult. Checkpoints let an interrupted run resume."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tersor.checkpoint.checkpoint_folder import Checkpoint
from tersor.checkpoint.store import Checkpoints, StageCheckpointer
from tersor.checkpoint.structure import rebuild, structure
from tersor.core import distributed
from tersor.core.device import precision_for, seeded
from tersor.core.progress import ProgressReporter, StageProgress
from tersor.evaluation.results import StageRecord
from tersor.graph.fused_inference import fused
from tersor.graph.modes import training_notes
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.stage_validation import validate, validation_curve
from tersor.pruning.mask import note_of_lost_zeros, unmasked_zeros
from tersor.recipe import Stage, Teacher
from tersor.training.attachment import Attachment, Chain
from tersor.training.context import AttachContext
from tersor.training.loop import fit
from tersor.training.method import chain
from tersor.training.precision import with_usable_precision
from tersor.training.schedule import steps_per_epoch
from tersor.training.snapshot import restoring

_CALIBRATION_BATCH = 64
_TEACHER = 0
"""Checkpoint unit of the teacher; the stages are units 1, 2, ..."""


@dataclass(frozen=True)
class StageResult:
    """The compressed model after a stage, the stage's record, and tensors that are stored beside the model."""

    model: nn.Module
    record: StageRecord
    extra_state: dict[str, Tensor]


def train_teacher(experiment: Experiment, checkpoints: Checkpoints, progress: ProgressReporter) -> nn.Module | None:
    """Train a teacher without weights on the labels alone; return the teacher."""
    options, teacher = experiment.recipe.teacher, experiment.teacher
    if teacher is None or experiment.teacher_is_trained or not isinstance(options, Teacher):
        return teacher
    end = checkpoints.end_of(_TEACHER)
    if end is not None:
        with restoring(str(end.path)):
            teacher.load_state_dict(end.network())
        progress.say("teacher: restored from its checkpoint")
        return teacher
    training = with_usable_precision(options.training, {"the teacher": teacher}, experiment.example, progress.say)
    batches = experiment.training_batches(training)
    steps = options.epochs * steps_per_epoch(batches, training)
    fit(
        Attachment(teacher),
        batches,
        training,
        steps=steps,
        progress=progress,
        seed=experiment.recipe.seed,
        name="teacher",
        task=experiment.task,
        checkpointer=StageCheckpointer(checkpoints, _TEACHER, "teacher", experiment.recipe.checkpoint_every, {}),
    )
    validate(experiment, teacher, "teacher", progress)
    _save_end(checkpoints, _TEACHER, "teacher", steps, teacher, {}, {})
    return teacher


def run_stages(
    experiment: Experiment,
    checkpoints: Checkpoints,
    progress: ProgressReporter,
    seconds: float | None = None,
    *,
    validate_all: bool = True,
) -> tuple[nn.Module, list[StageRecord]]:
    """Run all stages, from the last checkpoint on; return the compressed model and one record for each stage.

    Args:
        experiment: the network, its recipe and its data.
        checkpoints: the checkpoints of the run.
        progress: receives the progress of every stage.
        seconds: the time limit of the training in each stage that has not ended yet, in a search.
        validate_all: whether stages without training are validated, too.
    """
    model, records = copy.deepcopy(experiment.model), list[StageRecord]()
    stages = experiment.recipe.stages
    end = next((end for end in map(checkpoints.end_of, range(len(stages), 0, -1)) if end is not None), None)
    if end is not None:
        model = _restored(model, end)
        with restoring(str(end.path)):
            records = [StageRecord(**record) for record in end.stages]
        progress.say(f"{stages[end.unit - 1].name}: restored from its checkpoint")
    latest = 0 if end is None else end.unit
    for number, stage in enumerate(stages[latest:], latest + 1):
        validated = validate_all or experiment.steps_of(stage) > 0
        result = _run_stage(experiment, number, stage, model, checkpoints, progress, seconds, validated=validated)
        model = result.model
        records.append(result.record)
        record = {"stages": [record.model_dump(exclude_unset=True) for record in records]}
        _save_end(checkpoints, number, stage.name, result.record.steps, model, record, result.extra_state)
    return model, records


def stage_models(experiment: Experiment, checkpoints: Checkpoints) -> dict[int, nn.Module]:
    """The network after each stage, by the number of the stage, from the checkpoints."""
    ends = [end for end in checkpoints.ends() if end.unit != _TEACHER]
    return {end.unit: _restored(copy.deepcopy(experiment.model), end).eval() for end in ends}


def attach(
    experiment: Experiment,
    stage: Stage,
    model: nn.Module,
    progress: ProgressReporter,
    checkpoint: Callable[[nn.Module], None] = lambda _model: None,
) -> Chain:
    """Attach the methods of a stage to `model`."""
    steps = experiment.steps_of(stage)
    context = AttachContext(
        data=experiment.batches(experiment.data.train, _CALIBRATION_BATCH, shuffle=True, seed=experiment.recipe.seed),
        teacher=experiment.teacher,
        task=experiment.task,
        steps=steps,
        steps_per_epoch=steps_per_epoch(experiment.training_batches(stage), stage) if steps else None,
        target=experiment.recipe.target,
        latency=experiment.latency,
        progress=StageProgress(stage.name, progress),
        checkpoint=checkpoint,
    )
    with seeded(experiment.recipe.seed):
        return chain(stage.methods, model, context)


def _run_stage(
    experiment: Experiment,
    number: int,
    stage: Stage,
    model: nn.Module,
    checkpoints: Checkpoints,
    progress: ProgressReporter,
    seconds: float | None,
    *,
    validated: bool,
) -> StageResult:
    """Attach, begin, train, finish.

    What `attach` decides follows from the model's weights, which are those after the stage before: a resumed stage
    attaches again and then loads its own weights.
    """
    start, zeros = time.perf_counter(), unmasked_zeros(model)
    distributed.broadcast_from_rank0(model)
    attachment = attach(experiment, stage, model, progress, lambda network: keeper.keep_setup(network))
    every = experiment.recipe.checkpoint_every
    keeper = StageCheckpointer(checkpoints, number, stage.name, every, structure(attachment.model))
    steps = experiment.steps_of(stage)
    of_training = notes_of_training(experiment, stage, attachment.model) if steps else ()
    for note in (*attachment.notes, *of_training):
        progress.say(f"{stage.name}: {note}")
    if keeper.resume_state is None:
        _begin(attachment, stage.name, progress, keeper)
        keeper.notes = (*attachment.notes, *of_training)
    training, earlier_seconds = dict[str, Any](), 0.0
    if steps:
        with attachment.explained("training"):
            steps, training, earlier_seconds = _train(experiment, stage, attachment, steps, progress, keeper, seconds)
    attachment.finish()
    lost_zeros = note_of_lost_zeros(zeros, attachment.model)
    for note in lost_zeros:
        progress.say(f"{stage.name}: {note}")
    record = StageRecord(
        name=stage.name,
        methods=stage.model_dump(mode="json")["methods"],
        steps=steps,
        notes=[*keeper.notes, *lost_zeros],
        minutes=(time.perf_counter() - start + earlier_seconds) / 60,
        validation_score=validate(experiment, attachment.model, stage.name, progress) if validated else None,
        **training,
        **attachment.metrics,
    )
    return StageResult(attachment.model, record, attachment.extra_state)


def notes_of_training(experiment: Experiment, stage: Stage, network: nn.Module) -> tuple[str, ...]:
    """What a user should know about the training of a stage: the default learning rate, and what capture has lost."""
    notes: list[str] = []
    if stage.optimizer.learning_rate is None:
        trained = experiment.starts_trained(stage)
        weights = "trained" if trained else "random"
        notes.append(f"learning rate {stage.learning_rate(trained=trained):g}, the default for {weights} weights")
    return (*notes, *training_notes(network))


def _begin(attachment: Attachment, name: str, progress: ProgressReporter, keeper: StageCheckpointer) -> None:
    """The slow work before the first step, from where an interrupted run left it."""
    if keeper.setup_state is not None:
        with restoring(keeper.last):
            attachment.model.load_state_dict(keeper.setup_state)
        progress.say(f"{name}: resuming")
    reported = attachment.notes
    attachment.begin()
    for note in (note for note in attachment.notes if note not in reported):
        progress.say(f"{name}: {note}")
    for module in (attachment.model, *attachment.terms):
        distributed.broadcast_from_rank0(module)


def _train(
    experiment: Experiment,
    stage: Stage,
    attachment: Attachment,
    steps: int,
    progress: ProgressReporter,
    keeper: StageCheckpointer,
    seconds: float | None,
) -> tuple[int, dict[str, Any], float]:
    """The number of steps, the record of the training, and the seconds that earlier processes spent on it."""
    networks = {"the network": attachment.model, "the teacher": experiment.teacher}
    options = stage.with_learning_rate(trained=experiment.starts_trained(stage))
    options = with_usable_precision(options, networks, experiment.example, StageProgress(stage.name, progress).say)
    curve = validation_curve(experiment, stage)
    fitted = fit(
        attachment,
        experiment.training_batches(stage),
        options,
        steps=steps,
        teacher=_fast_teacher(experiment, options, attachment),
        progress=progress,
        seed=experiment.recipe.seed,
        name=stage.name,
        task=experiment.task,
        checkpointer=keeper,
        cache_batches=experiment.batches(experiment.data.train, experiment.evaluation_batch) if stage.cache else None,
        curve=curve,
        seconds=seconds,
        origin="recipe" if seconds is None else "search",
    )
    record = {"losses": fitted.losses, "precision": fitted.precision, "training_seconds": fitted.seconds}
    if curve is not None:
        record |= {"validation_by_epoch": curve.values, "validated_at": curve.steps}
    return fitted.steps, record, fitted.earlier_seconds


def _fast_teacher(experiment: Experiment, stage: Stage, attachment: Attachment) -> nn.Module | None:
    """A copy of the teacher with fused layers, where a loss needs its outputs.

    If the targets of the task are the outputs of the original and there is no teacher, the original is the teacher.
    """
    teacher, from_original = experiment.teacher, experiment.task.from_original
    if teacher is None and from_original:
        teacher = copy.deepcopy(experiment.original).eval()
    if teacher is None or not (attachment.terms or from_original):
        return teacher
    precision = precision_for(experiment.example.device, stage.precision)
    return fused(teacher, experiment.example, [path for _, path in attachment.layers], precision)


def _restored(model: nn.Module, end: Checkpoint) -> nn.Module:
    with restoring(str(end.path)):
        network = rebuild(model, end.structure())
        network.load_state_dict(end.network())
    return network


def _save_end(
    checkpoints: Checkpoints,
    unit: int,
    name: str,
    steps: int,
    network: nn.Module,
    record: dict[str, Any],
    extra_state: dict[str, Tensor],
) -> None:
    if distributed.rank():
        return
    tensors = {f"model.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"kept.{key}": value for key, value in extra_state.items()}
    checkpoints.save(unit, name, step=steps, done=True, tensors=tensors, structure=structure(network), record=record)
