"""A recipe, walked through to one folder with the evidence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from tersor import recipe as recipes
from tersor.checkpoint.artifact import MANIFEST, read_artifact, require_free, write_folder
from tersor.checkpoint.model_folder import write_files
from tersor.checkpoint.store import Checkpoints
from tersor.core import distributed
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress, ProgressReporter
from tersor.core.resources import enough_memory, writable
from tersor.data import Splits
from tersor.deploy.float_operators import float_operators
from tersor.deploy.onnx import export
from tersor.deploy.static_batch import batch_for, static_batch_reason
from tersor.evaluation.latency_ratio import latency_ratio
from tersor.evaluation.results import OF_STAGES, measure
from tersor.pipeline import latency_cache
from tersor.pipeline.experiment import EVALUATION_BATCH, Experiment
from tersor.pipeline.latency_cache import CachedLatencyRatio
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import StageRecord, run_stages, stage_models, train_teacher
from tersor.quantization.quantizers import find_quantizers
from tersor.recipe import Recipe
from tersor.report.analysis.evidence import gather
from tersor.report.page import draw

_AGREEMENT = 99.0
"""Percent of torch's answers that the file should give in its runtime."""
_BYTE = 8
_MEMORY = "Close other programs, or use smaller images (data.image_size) or a smaller network."


def run(
    recipe: Recipe | Path | str,
    *,
    model: nn.Module | None = None,
    data: Splits | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: ProgressReporter | None = None,
) -> Path:
    """Compresses a network as the recipe says, and writes one folder: model, original, recipe, numbers, manifest.

    Args:
        recipe: a recipe, or the path of one.
        model: a trained network in place of the one that the recipe names; it stays as it is.
        data: images in place of the recipe's.
        out: the folder to write; `runs/<name of the recipe>` by default. It must not exist.
        resume: go on with the run into `out` that has not ended, with the same `model` and `data`; from the beginning
            where there is none.
        progress: reports the progress.

    Returns:
        The folder.

    Raises:
        InputError: something that was given cannot be used.
    """
    distributed.init_process_group()
    progress = progress if progress and not distributed.rank() else NullProgress()
    if not isinstance(model, nn.Module | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"model is a {type(model).__name__}. Pass a torch.nn.Module, or name one in the recipe.")
    if not isinstance(data, Splits | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"data is a {type(data).__name__}. Pass tersor.data.Splits, which tersor.data.load gives.")
    if not isinstance(recipe, Recipe | Path | str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"recipe is a {type(recipe).__name__}. Pass a path, or what tersor.recipe.parse gives.")
    name = "recipe" if isinstance(recipe, Recipe) else Path(recipe).stem
    recipe = recipe if isinstance(recipe, Recipe) else recipes.read(recipe)
    out = Path(out) if out is not None else Path("runs") / name
    checkpoints = Checkpoints(out.with_name(f"{out.name}.checkpoints"))
    text = recipes.write(recipe)
    if resume and _ended(out, text):
        if not distributed.rank():
            checkpoints.remove()  # the run may have been killed between its last two moves
        progress.say(f"{out} is there already: nothing is left to do.")
        return out
    require_free(out)
    with enough_memory(_MEMORY), writable(out), checkpoints.held(text, resume=resume):
        experiment = prepare(recipe, model=model, data=data, progress=progress)
        if not (resume or distributed.rank()):
            (checkpoints.folder / latency_cache.FILE).unlink(
                missing_ok=True
            )  # of a run that was killed before a checkpoint
        measure_ratio = partial(latency_ratio, progress=progress)
        cached = CachedLatencyRatio(measure_ratio, checkpoints.folder / latency_cache.FILE)
        experiment = replace(experiment, latency=cached)
        experiment = replace(experiment, teacher=train_teacher(experiment, checkpoints, progress))
        compressed, records = run_stages(experiment, checkpoints, progress)
        for path in dict.fromkeys(checkpoints.damaged):
            progress.say(f"{path} is damaged, and was passed over.")
        if not distributed.rank():
            write_folder(
                out,
                lambda folder: _fill(folder, experiment, compressed, records, checkpoints, progress),
                partial=checkpoints.scratch,
            )
            checkpoints.remove()
    distributed.barrier()
    return out


def _ended(out: Path, recipe: str) -> bool:
    """Whether `out` is what a run of `recipe` leaves."""
    if not (out / MANIFEST).is_file():
        return False
    written = read_artifact(out).files.get("recipe.yaml")
    return written is not None and written.read_text() == recipe


def _fill(
    folder: Path,
    experiment: Experiment,
    compressed: nn.Module,
    records: Sequence[StageRecord],
    checkpoints: Checkpoints,
    progress: ProgressReporter,
) -> None:
    recipe, data, original = experiment.recipe, experiment.data, experiment.original
    assert data.mean is not None
    assert data.std is not None
    test = experiment.batches(data.test, EVALUATION_BATCH)
    example = next(iter(test)).images[:1]
    pixels = (data.mean, data.std) if recipe.target.input == "uint8" else None
    with TemporaryDirectory() as scratch:
        left = {
            number: (network, Path(scratch) / f"{number}.onnx")
            for number, network in stage_models(experiment, checkpoints).items()
            if number < len(records)
        }
        files = [(original, folder / "original.onnx"), (compressed, folder / "model.onnx"), *left.values()]
        progress.start("export", len(files))
        for network, path in files:
            batch = batch_for(network, recipe.target)
            export(network, example, path, classes=data.classes, pixels=pixels, batch=batch)
            progress.advance()
        if batch_for(compressed, recipe.target) != recipe.target.batch:
            progress.say(static_batch_reason())
        numbers, answers = measure(
            original, compressed, folder, test, recipe.target, seed=recipe.seed, progress=progress, stages=left
        )
    if numbers["agreement_with_torch"] < _AGREEMENT:
        progress.say(_told_of_disagreement(numbers["agreement_with_torch"], compressed))
    in_float, warning = float_operators(compressed, example)
    numbers["artifact"] |= in_float
    if warning is not None:
        progress.say(f"warning: {warning}")
    # the last stage left the artifact
    numbers["stages"][len(records)] = {key: numbers["artifact"][key] for key in OF_STAGES} | {
        "speedup": numbers["speedup"]["original"]
    }
    told = [{**flat(record), **numbers["stages"].get(number, {})} for number, record in enumerate(records, 1)]
    numbers |= {"stages": told, "mean": data.mean, "std": data.std, "classes": data.classes}
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1))
    evidence = gather(
        original,
        compressed,
        experiment.teacher,
        experiment.model,
        folder,
        test,
        recipe.target,
        answers=answers,
        baseline=numbers["baseline"],
        progress=progress,
    )
    (folder / "evidence.json").write_text(json.dumps(evidence))
    draw(folder)
    (folder / "recipe.yaml").write_text(recipes.write(recipe))
    write_files(compressed, folder)
    (folder / "checkpoints").mkdir()
    for each in checkpoints.ends():  # copied: until the folder is written they are what a run goes on from
        shutil.copytree(each.path, folder / "checkpoints" / each.path.name)


def flat(record: StageRecord) -> dict[str, Any]:
    """The record as one level of JSON."""
    fields = vars(record)
    return (
        {name: fields[name] for name in fields if name not in ("training", "metrics")}
        | record.training
        | record.metrics
    )


def _told_of_disagreement(percent: float, model: nn.Module) -> str:
    laid = find_quantizers(model)
    coarse = laid is not None and any(laid.of_activation(name).grid.bits < _BYTE for name in laid.activations)
    if not coarse:
        return f"the artifact gives {percent:.2f} % of torch's answers: do not ship it."
    return (
        f"the artifact gives {percent:.2f} % of torch's answers. On so few bits a bias, which lies in the file as a "
        "whole number of products of two steps, moves an activation by a whole step where torch's does not, and the "
        "layers behind it with it: the accuracy that counts is the runtime's."
    )
