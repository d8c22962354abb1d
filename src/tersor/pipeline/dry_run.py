"""`tersor run --explain`: what a recipe would do, without training anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from tersor.core.errors import counted
from tersor.core.progress import ProgressReporter
from tersor.evaluation.costs import costs
from tersor.graph.comparison import outputs_of
from tersor.methods import name_of
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import attach, notes_of_training
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.integer_coverage import integer_coverage
from tersor.recipe import Recipe, Teacher
from tersor.tasks import name_of as task_name
from tersor.tasks.classification import Classification
from tersor.training.schedule import steps_per_epoch


def explain(recipe: Recipe, *, progress: ProgressReporter) -> Iterator[str]:
    """Describe what `run` would do, line by line, with shapes and costs."""
    experiment = prepare(recipe, model=None, data=None, progress=progress)
    example = next(iter(experiment.batches(experiment.data.test, 1))).images
    size = " x ".join(map(str, example.shape[1:]))
    classes = len(experiment.data.classes)
    classifies = isinstance(experiment.task, Classification)
    counts = {"train": experiment.data.train, "validation": experiment.data.validation, "test": experiment.data.test}
    yield (
        f"data: {', '.join(f'{len(images)} {name}' for name, images in counts.items())} images of {size}, "
        + (f"{classes} classes" if classifies else f"task {task_name(experiment.task)}: {experiment.task.metric}")
    )
    for name, network in (("model", experiment.model), ("teacher", experiment.teacher)):
        if network is not None:
            spent = costs(network, example)
            returned = f"({classes})"
            if not classifies:
                returned = ", ".join(str(tuple(each.shape[1:])) for each in outputs_of(network, example))
            shapes = f"({size}) -> {returned}, {len(spent.layers)} layers"
            yield f"{name}: {shapes}, {spent.parameters:,} parameters, {spent.macs:,} MACs"
            if spent.uncounted:
                yield f"{name}: operators not included in the MACs: {', '.join(spent.uncounted)}"
    wanted = recipe.teacher
    if isinstance(wanted, Teacher) and not experiment.teacher_is_trained:
        steps = wanted.epochs * steps_per_epoch(experiment.training_batches(wanted.training), wanted.training)
        yield f"the teacher is first trained on the labels for {counted(wanted.epochs, 'epoch')}, {steps:,} steps"
    model = copy.deepcopy(experiment.model)
    for number, stage in enumerate(recipe.stages, 1):
        steps = experiment.steps_of(stage)
        attachment = attach(experiment, stage, model, progress)
        model = attachment.model
        names = ", ".join(map(name_of, stage.methods)) or "no method"
        spent = costs(model, example)
        losses = ["labels"] * bool(attachment.label_weight) + [term.name for term in attachment.terms]
        yield (
            f"stage {number}, {stage.name}: {names}; {steps:,} steps of {stage.batch_size} images"
            + (f", losses: {', '.join(losses)}" if steps else "")
            + f"; afterwards {spent.parameters:,} parameters, {spent.macs:,} MACs"
        )
        of_training = notes_of_training(experiment, stage, attachment.model) if steps else ()
        yield from (f"{stage.name}: {note}" for note in (*attachment.notes, *of_training))
        if any(isinstance(module, FakeQuantize) for module in model.modules()):
            covered = integer_coverage(model, example, planned=True)
            yield from (f"{stage.name}: {note}" for note in covered.notes)
            if covered.warning:
                yield f"warning: {covered.warning}"
    yield f"target: {recipe.target.runtime} on {recipe.target.cpu}, {recipe.target.input} input"
