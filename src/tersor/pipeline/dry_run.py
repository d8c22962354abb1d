"""What a recipe would do, without doing it."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.core.progress import ProgressReporter
from tersor.evaluation.costs import costs
from tersor.methods import name_of
from tersor.pipeline.setup import prepare
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.integer_coverage import integer_coverage
from tersor.recipe import Recipe, Teacher
from tersor.training.loop import steps_per_epoch


def explain(recipe: Recipe, *, watch: ProgressReporter) -> Iterator[str]:
    """What `run` would do, line by line, with shapes and costs; nothing is trained and nothing is written."""
    walk = prepare(recipe, model=None, data=None, watch=watch)
    example = next(iter(walk.batches(walk.data.test, 1))).images
    size = " x ".join(map(str, example.shape[1:]))
    classes = len(walk.data.classes)
    counts = {"train": walk.data.train, "validation": walk.data.validation, "test": walk.data.test}
    yield (
        f"data: {', '.join(f'{len(images)} {name}' for name, images in counts.items())} images of {size}, "
        f"{classes} classes"
    )
    for name, network in (("model", walk.model), ("teacher", walk.teacher)):
        if network is not None:
            spent = costs(network, example)
            shapes = f"({size}) -> ({classes}), {len(spent.layers)} layers"
            yield f"{name}: {shapes}, {spent.parameters:,} parameters, {spent.macs:,} MACs"
            if spent.uncounted:
                yield f"{name}: in no count of MACs: {', '.join(spent.uncounted)}"
    wanted = recipe.teacher
    if isinstance(wanted, Teacher) and not walk.teacher_is_trained:
        steps = wanted.epochs * steps_per_epoch(walk.training_batches(wanted.training), wanted.training)
        yield f"first the teacher is trained on the labels: {wanted.epochs} epochs, {steps:,} steps"
    for number, stage in enumerate(recipe.stages, 1):
        batches = walk.training_batches(stage)
        steps = stage.steps or stage.epochs * steps_per_epoch(batches, stage)
        attachment = walk.attach(stage, steps, watch)
        walk.model = attachment.model
        names = ", ".join(map(name_of, stage.methods)) or "no method"
        spent = costs(walk.model, example)
        losses = ["labels"] * bool(attachment.label_weight) + [term.name for term in attachment.terms]
        yield (
            f"stage {number}, {stage.name}: {names}; {steps:,} steps of {stage.batch_size} images"
            + (f" for the losses {', '.join(losses)}" if steps else "")
            + f"; then {spent.parameters:,} parameters, {spent.macs:,} MACs"
        )
        yield from (f"{stage.name}: {note}" for note in attachment.notes)
        if any(isinstance(module, FakeQuantize) for module in walk.model.modules()):
            covered = integer_coverage(walk.model, example, planned=True)
            yield from (f"{stage.name}: {note}" for note in covered.notes)
            if covered.warning:
                yield f"warning: {covered.warning}"
    yield f"target: {recipe.target.runtime} on {recipe.target.cpu}, {recipe.target.input} input"
