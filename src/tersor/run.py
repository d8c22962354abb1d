"""A recipe, walked through to one folder with the evidence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from tersor import recipe as recipes
from tersor.core.watch import Unwatched, Watch
from tersor.data import Splits
from tersor.export.artifact import require_free, write_folder
from tersor.export.numbers import measure
from tersor.export.onnx import export
from tersor.recipe import Recipe
from tersor.walk import EVALUATION_BATCH, Checkpoints, Walk, prepare

_AGREEMENT = 99.0
"""Percent of torch's answers that the file should give in its runtime."""


def run(
    recipe: Recipe | Path | str,
    *,
    model: nn.Module | None = None,
    data: Splits | None = None,
    out: Path | str | None = None,
    watch: Watch | None = None,
) -> Path:
    """Compresses a network as the recipe says, and writes one folder: model, original, recipe, numbers, manifest.

    Args:
        recipe: a recipe, or the path of one.
        model: a trained network in place of the one that the recipe names; it stays as it is.
        data: images in place of the recipe's.
        out: the folder to write; `runs/<name of the recipe>` by default. It must not exist.
        watch: who looks on.

    Returns:
        The folder.

    Raises:
        InputError: something that was given cannot be used.
    """
    watch = watch or Unwatched()
    name = "recipe" if isinstance(recipe, Recipe) else Path(recipe).stem
    recipe = recipe if isinstance(recipe, Recipe) else recipes.read(recipe)
    out = Path(out) if out is not None else Path("runs") / name
    require_free(out)
    walk = prepare(recipe, model=model, data=data, watch=watch)
    checkpoints = Checkpoints(out.with_name(f"{out.name}.checkpoints"))
    walk.train_teacher(watch, checkpoints)
    original = copy.deepcopy(walk.original)
    stages = [walk.stage(stage, watch, checkpoints) for stage in recipe.stages]
    return write_folder(out, lambda folder: _fill(folder, walk, original, stages, checkpoints, watch))


def _fill(
    folder: Path,
    walk: Walk,
    original: nn.Module,
    stages: list[dict[str, Any]],
    checkpoints: Checkpoints,
    watch: Watch,
) -> None:
    recipe, data = walk.recipe, walk.data
    assert data.mean is not None
    assert data.std is not None
    test = walk.batches(data.test, EVALUATION_BATCH)
    example = next(iter(test)).images[:1]
    pixels = (data.mean, data.std) if recipe.target.input == "uint8" else None
    watch.start("export", 2)
    for network, name in ((original, "original.onnx"), (walk.model, "model.onnx")):
        export(network, example, folder / name, classes=data.classes, pixels=pixels)
        watch.advance()
    numbers = measure(original, walk.model, folder, test, recipe.target, seed=recipe.seed, watch=watch)
    if numbers["agreement_with_torch"] < _AGREEMENT:
        watch.say(f"the artifact gives {numbers['agreement_with_torch']:.2f} % of torch's answers: do not ship it.")
    numbers |= {"stages": stages, "mean": data.mean, "std": data.std, "classes": data.classes}
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1))
    (folder / "recipe.yaml").write_text(recipes.write(recipe))
    (folder / "checkpoints").mkdir()
    for path in checkpoints.saved:
        shutil.move(path, folder / "checkpoints" / path.name)
    if checkpoints.folder.is_dir() and not any(checkpoints.folder.iterdir()):
        checkpoints.folder.rmdir()
