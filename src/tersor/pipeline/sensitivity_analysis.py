"""What each layer of a recipe's model costs on each width: measured into a file, which is gone on with.

NAME.sensitivity.json     what was measured, with what, and how many weights a layer has
NAME.sensitivity.svg      the same as a heat map
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tersor.core.errors import InputError
from tersor.core.progress import ProgressReporter
from tersor.data import Images
from tersor.data.image_sets import View
from tersor.data.stratified import generator, stratified
from tersor.graph.capture import capture
from tersor.graph.layer_selection import weighted_layers
from tersor.pipeline.experiment import EVALUATION_BATCH
from tersor.pipeline.setup import prepare
from tersor.quantization.options import Precision
from tersor.quantization.quantizers import insert_quantizers
from tersor.quantization.sensitivity import Cost, sensitivity
from tersor.recipe import Recipe
from tersor.report.sensitivity_map import draw

WIDTHS = (2, 3, 4, 5, 6, 8)
_DIGITS = 16


class BitCosts(BaseModel):
    """The file.

    Attributes:
        measured_with: all that the costs depend on, by its name in the recipe.
        weights: layer -> how many weights it has.
        costs: those that were measured, in the order of the layers.
    """

    measured_with: dict[str, Any]
    weights: dict[str, int]
    costs: list[Cost]


def measure(
    recipe: Recipe, *, out: Path, images: int | None = None, progress: ProgressReporter
) -> tuple[BitCosts, Path]:
    """Measures every layer on 2, 3, 4, 5, 6 and 8 bits, on the validation images, and draws a figure beside the file.

    Args:
        recipe: whose model, data and target are taken; its stages are not walked.
        out: the file, written after each measurement; one that is there is gone on with.
        images: how many of the validation images to look at, drawn in proportion to the classes; all if left.
        progress: reports the progress.

    Returns:
        What the file holds, and the path of the figure.

    Raises:
        InputError: the model has no weights, there are no validation images, `out` cannot be written or was measured
            with something else; whatever `prepare` raises.
    """
    _require_writable(out)
    if recipe.model.weights is None:
        raise InputError(
            f"{recipe.model.name} comes without weights, and what rounding costs a network that has learned nothing "
            "tells nothing. Write model.weights, the file of a trained one."
        )
    experiment = prepare(recipe, model=None, data=None, progress=progress)
    shown = _some(experiment.data.validation, images, recipe.seed)
    layers = weighted_layers(experiment.model)
    quantizers = insert_quantizers(
        capture(experiment.model),
        Precision(),
        exclude=(),
        target=recipe.target,
        method="sensitivity",
        original=experiment.model,
    )
    weights = {name: layers[name].weight.numel() for name in quantizers.layers}
    found = _begun(out, BitCosts(measured_with=_measured_with(recipe, len(shown)), weights=weights, costs=[]))
    known = {(cost.layer, cost.bits) for cost in found.costs}
    asked = [(name, bits) for name in quantizers.layers for bits in WIDTHS if (name, bits) not in known]
    if known:
        progress.say(f"{out}: {len(known)} measurements are there already, {len(asked)} are left")
    progress.start("sensitivity", len(known) + len(asked))
    progress.advance(len(known))
    for cost in sensitivity(quantizers, experiment.batches(shown, EVALUATION_BATCH), asked, target=recipe.target):
        found.costs.append(cost)
        _write(out, found.model_dump_json(indent=1) + "\n")
        progress.advance(error=cost.error)
    figure = out.with_suffix(".svg")
    title = f"{recipe.model.name}: what one layer costs, rounded alone"
    _write(figure, draw(found.costs, weights, title, _subtitle(len(shown))))
    return found, figure


def _subtitle(images: int) -> str:
    return f"error of the logits in % of their mean square, {images:,} validation images"


def _require_writable(out: Path) -> None:
    if out.suffix != ".json":
        raise InputError(f"{out} is no name for what is written, which is JSON. Write --out NAME.json.")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise InputError(f"cannot write {out}. Possible: a file in a folder that is there and may be written to.")


def _some(images: Images, count: int | None, seed: int) -> Images:
    if not len(images):
        raise InputError(
            "there are no validation images to measure on: data.validation is 0. Write data: {validation: 0.1}, which "
            "holds out a tenth of the training images."
        )
    if count is None or count >= len(images):
        return images
    drawn, _ = stratified(images.labels, count, generator(seed, count))
    return View(images, drawn)


def _measured_with(recipe: Recipe, images: int) -> dict[str, Any]:
    assert recipe.model.weights is not None
    with recipe.model.weights.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:_DIGITS]
    data = recipe.data.model_dump(mode="json", exclude={"augment"})
    return {
        "model.name": recipe.model.name,
        "SHA-256 of model.weights": digest,
        **{f"data.{key}": value for key, value in data.items()},
        "seed": recipe.seed,
        "target.cpu": recipe.target.cpu,
        "images": images,
    }


def _begun(out: Path, fresh: BitCosts) -> BitCosts:
    """What `out` holds already, if it was measured with the same."""
    if not out.exists():
        return fresh
    remedy = f"Name another file with --out, or remove {out}."
    try:
        found = BitCosts.model_validate_json(out.read_bytes())
    except (ValidationError, OSError) as error:
        raise InputError(f"{out} is no file of `tersor sensitivity`, or is damaged. {remedy}") from error
    if not all(cost.layer in found.weights and cost.bits in WIDTHS for cost in found.costs):
        raise InputError(f"{out} has costs of layers or bits that are not measured, so it is damaged. {remedy}")
    for key in fresh.measured_with:
        before, now = found.measured_with.get(key), fresh.measured_with[key]
        if before != now:
            raise InputError(f"{out} was measured with {key}: {before}, and this would be with {now}. {remedy}")
    if found.weights != fresh.weights:
        raise InputError(f"{out} was measured on other layers than the model has. {remedy}")
    return found


def _write(path: Path, text: str) -> None:
    """Whole or not at all: whoever stops this finds the file as it was, or as it will be."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)
