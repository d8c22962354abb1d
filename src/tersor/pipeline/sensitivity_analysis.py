"""Sensitivity of each layer of a recipe's model to each bit width, measured into a resumable file.

NAME.sensitivity.json     the measurements, their settings, and the number of weights of each layer
NAME.sensitivity.svg      the same as a heat map
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from tersor.core.errors import InputError
from tersor.core.files import sha256, write_file
from tersor.core.progress import ProgressReporter
from tersor.data import Images
from tersor.data.image_sets import View, class_numbers
from tersor.data.stratified import generator, stratified
from tersor.graph.capture import capture
from tersor.graph.layer_selection import weighted_layers
from tersor.pipeline.experiment import EVALUATION_BATCH
from tersor.pipeline.setup import prepare
from tersor.quantization.quantizer_options import Precision
from tersor.quantization.quantizers import ends, insert_quantizers
from tersor.quantization.sensitivity import Cost, sensitivity
from tersor.recipe import Recipe
from tersor.report.sensitivity_map import sensitivity_svg
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task

WIDTHS = (2, 3, 4, 5, 6, 8)
_DIGITS = 16


class BitCosts(BaseModel):
    """The error of each layer at each bit width."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    measured_with: dict[str, Any]
    """Everything that the costs depend on, by its name in the recipe."""
    weights: dict[str, int]
    """Number of weights of each layer, in the order of the layers."""
    first_and_last: list[str] = []
    """Names of the first and the last layer, which `ptq` keeps at 8 bits unless `first_last_bits` is set."""
    costs: list[Cost]
    """The measured costs, in the order of the layers."""


def measure(
    recipe: Recipe, *, out: Path, images: int | None = None, progress: ProgressReporter
) -> tuple[BitCosts, Path]:
    """Measure every layer at 2, 3, 4, 5, 6 and 8 bits on the validation images, and draw a figure beside the file.

    Args:
        recipe: its model, data and target are used; its stages are not run.
        out: the file, written after each measurement; an existing file is resumed.
        images: number of validation images, drawn in proportion to the classes; all by default.
        progress: reports the progress.

    Returns:
        The content of the file, and the path of the figure.

    Raises:
        InputError: the model has no weights, there are no validation images, `out` cannot be written or was measured
            with other settings; whatever `prepare` raises.
    """
    _require_writable(out)
    if recipe.model.weights is None:
        raise InputError(
            f"{recipe.model.name} has no weights. The sensitivity of an untrained network is meaningless. Write "
            "model.weights, the weights file of a trained network."
        )
    experiment = prepare(recipe, model=None, data=None, progress=progress)
    shown = _some(experiment.data.validation, images, recipe.seed)
    layers = weighted_layers(experiment.model)
    quantizers = insert_quantizers(
        capture(experiment.model, next(iter(experiment.batches(shown, EVALUATION_BATCH))).images),
        Precision(),
        exclude=(),
        target=recipe.target,
        method="sensitivity",
    )
    weights = {name: layers[name].weight.numel() for name in quantizers.layers}
    kept = [name for name in quantizers.layers if name in ends(quantizers.graph)]
    settings = _measured_with(recipe, len(shown))
    found = _begun(out, BitCosts(measured_with=settings, weights=weights, first_and_last=kept, costs=[]))
    known = {(cost.layer, cost.bits) for cost in found.costs}
    asked = [(name, bits) for name in quantizers.layers for bits in WIDTHS if (name, bits) not in known]
    if known:
        progress.say(f"{out}: resuming after {len(known)} measurements, {len(asked)} remain")
    progress.start("sensitivity", len(known) + len(asked))
    progress.advance(len(known))
    batches = experiment.batches(shown, EVALUATION_BATCH)
    for cost in sensitivity(quantizers, batches, asked, target=recipe.target, task=experiment.task):
        found.costs.append(cost)
        write_file(out, (found.model_dump_json(indent=1) + "\n").encode())
        progress.advance(error=cost.error)
    figure = out.with_suffix(".svg")
    title = f"{recipe.model.name}: sensitivity of each layer, quantized alone"
    write_file(figure, sensitivity_svg(found.costs, weights, title, _subtitle(len(shown), experiment.task)).encode())
    return found, figure


def _subtitle(images: int, task: Task) -> str:
    what = "logits" if isinstance(task, Classification) else "outputs"
    return f"mean squared error of the {what} in % of their mean square, {images:,} validation images"


def _require_writable(out: Path) -> None:
    if out.suffix != ".json":
        raise InputError(f"{out} is not a JSON file name. Write --out NAME.json.")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise InputError(f"cannot write {out}. Possible: a file in an existing folder with write permission.")


def _some(images: Images, count: int | None, seed: int) -> Images:
    if not len(images):
        raise InputError(
            "there are no validation images: data.validation is 0. Write data: {validation: 0.1}, which holds out a "
            "tenth of the training images."
        )
    if count is None or count >= len(images):
        return images
    labels = class_numbers(images)
    strata = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    drawn, _ = stratified(strata, count, generator(seed, count))
    return View(images, drawn)


def _measured_with(recipe: Recipe, images: int) -> dict[str, Any]:
    assert recipe.model.weights is not None
    data = recipe.data.model_dump(mode="json", exclude={"augment"})
    return {
        "model.name": recipe.model.name,
        "SHA-256 of model.weights": sha256(recipe.model.weights)[:_DIGITS],
        **{f"data.{key}": value for key, value in data.items()},
        "seed": recipe.seed,
        "target.cpu": recipe.target.cpu,
        "images": images,
    }


def _begun(out: Path, fresh: BitCosts) -> BitCosts:
    """The measurements that `out` already holds, if its settings are the same."""
    if not out.exists():
        return fresh
    remedy = f"Name another file with --out, or remove {out}."
    try:
        found = BitCosts.model_validate_json(out.read_bytes())
    except (ValidationError, OSError) as error:
        raise InputError(f"{out} was not written by `tersor sensitivity`, or is damaged. {remedy}") from error
    if not all(cost.layer in found.weights and cost.bits in WIDTHS for cost in found.costs):
        raise InputError(f"{out} is damaged: it has unknown layers or bit widths. {remedy}")
    for key in fresh.measured_with:
        before, now = found.measured_with.get(key), fresh.measured_with[key]
        if before != now:
            raise InputError(f"{out} was measured with {key}: {before}, but now it is {now}. {remedy}")
    if found.weights != fresh.weights:
        raise InputError(f"{out} was measured on a model with other layers. {remedy}")
    return found.model_copy(update={"first_and_last": fresh.first_and_last})
