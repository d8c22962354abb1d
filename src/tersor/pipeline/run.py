"""Run a recipe: stages, export, measurement and report, into one folder."""

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
from tersor.checkpoint.artifact import MANIFEST, checkpoints_of, read_artifact, require_free, write_folder
from tersor.checkpoint.model_folder import write_files
from tersor.checkpoint.store import Checkpoints
from tersor.core import distributed
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress, ProgressReporter, WarningProgress
from tersor.core.resources import enough_memory, writable
from tersor.data import Batches, Splits
from tersor.deploy.onnx import export
from tersor.deploy.static_batch import batch_for, static_batch_reason
from tersor.evaluation.latency_ratio import latency_ratio
from tersor.evaluation.measurement import measure
from tersor.evaluation.results import Results, StageRecord
from tersor.evaluation.scoring import targets_of
from tersor.evaluation.standard_error import SEEN, error_of_difference, measures_accuracy
from tersor.evaluation.unsupported_quantizers import remove_unsupported_quantizers
from tersor.pipeline import latency_cache
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.latency_cache import CachedLatencyRatio
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages, stage_models, train_teacher
from tersor.quantization.quantizers import find_quantizers
from tersor.recipe import Recipe
from tersor.report.analysis.evidence import collect_evidence
from tersor.report.page import write_report
from tersor.report.summary import disagreement, slower_by_quantization
from tersor.tasks.classification import Classification
from tersor.training.teacher_check import COMPRESS_LESS, chance_warning

_BYTE = 8
_MEMORY = "Close other programs, or use smaller images (data.image_size) or a smaller network."


def run(
    recipe: Recipe | Path | str,
    *,
    model: nn.Module | None = None,
    teacher: nn.Module | None = None,
    data: Splits | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    latency: bool = True,
    progress: ProgressReporter | None = None,
) -> Path:
    """Compress a network with a recipe and write one folder: model, original, report, numbers, recipe, checkpoints.

    Args:
        recipe: a recipe, or the path of one.
        model: a trained network, instead of the one in the recipe; it is not changed.
        teacher: a trained network, instead of the teacher in the recipe, which must have an entry `teacher`; it is not
            changed.
        data: images, instead of those in the recipe.
        out: the folder to write, `runs/<name of the recipe>` by default; it must not exist.
        resume: resume the interrupted run in `out`, with the same `model`, `teacher` and `data`; if there is none,
            start a new run.
        latency: whether to measure the latency of the files at the end. Without it, the results have no speedup;
            `tersor bench` can measure it later. Methods that need latency still measure it.
        progress: receives the progress; `tersor.progress_bars.Bars` draws it. Without it, only warnings are issued.

    Returns:
        The folder.

    Raises:
        InputError: an argument, the recipe, a network or the data cannot be used.
    """
    distributed.init_process_group()
    progress = NullProgress() if distributed.rank() else progress or WarningProgress()
    _check_types(recipe, model, teacher, data)
    name = "recipe" if isinstance(recipe, Recipe) else Path(recipe).stem
    recipe = recipe if isinstance(recipe, Recipe) else recipes.read(recipe)
    out = Path(out) if out is not None else Path("runs") / name
    if not out.name:
        raise InputError(f"out is '{out}', which exists. Write the name of a new folder, such as runs/{name}.")
    checkpoints = Checkpoints(checkpoints_of(out))
    text = recipes.write(recipe)
    if resume and _ended(out, text):
        if not distributed.rank():
            checkpoints.remove()  # the run may have been killed after it wrote the folder
        progress.say(f"{out} exists: the run is complete.")
        if latency and not _has_latency(out):
            progress.say(f"the run in {out} did not measure latency. To measure it: tersor bench {out}")
        return out
    require_free(out)
    held = checkpoints.held(text, resume=resume, changes=lambda before: recipes.changes(before, recipe))
    with enough_memory(_MEMORY), writable(out), held:
        experiment = prepare(
            recipe, model=model, teacher=teacher, data=data, progress=progress, own_mean=data is not None
        )
        if not (resume or distributed.rank()):
            # left by a run that was killed before its first checkpoint
            (checkpoints.folder / latency_cache.FILE).unlink(missing_ok=True)
        measure_ratio = partial(latency_ratio, progress=progress)
        cached = CachedLatencyRatio(measure_ratio, checkpoints.folder / latency_cache.FILE)
        experiment = replace(experiment, latency=cached)
        experiment = replace(experiment, teacher=train_teacher(experiment, checkpoints, progress))
        compressed, records = run_stages(experiment, checkpoints, progress)
        for path in dict.fromkeys(checkpoints.damaged):
            progress.say(f"{path} is damaged and was skipped.")
        if not distributed.rank():
            write_folder(
                out,
                lambda folder: _fill(folder, experiment, compressed, records, checkpoints, progress, latency=latency),
                partial=checkpoints.scratch,
            )
            checkpoints.remove()
    distributed.barrier()
    return out


def _check_types(recipe: object, model: object, teacher: object, data: object) -> None:
    for name, network in (("model", model), ("teacher", teacher)):
        if not isinstance(network, nn.Module | None):
            raise InputError(
                f"{name} is of type {type(network).__name__}. Pass a torch.nn.Module, or write the {name} in the "
                "recipe."
            )
    if not isinstance(data, Splits | None):
        raise InputError(
            f"data is of type {type(data).__name__}. Pass the tersor.data.Splits returned by tersor.data.load."
        )
    if not isinstance(recipe, Recipe | Path | str):
        raise InputError(
            f"recipe is of type {type(recipe).__name__}. Pass a path, or a Recipe returned by tersor.recipe.parse."
        )


def _ended(out: Path, recipe: str) -> bool:
    """Whether `out` holds a complete run of `recipe`."""
    if not (out / MANIFEST).is_file():
        return False
    written = read_artifact(out).files.get("recipe.yaml")
    return written is not None and written.read_text() == recipe


def _has_latency(out: Path) -> bool:
    """Whether the complete run in `out` has measured latency."""
    numbers = read_artifact(out).files.get("numbers.json")
    return numbers is None or Results.model_validate_json(numbers.read_text()).latency_measured


def _fill(
    folder: Path,
    experiment: Experiment,
    compressed: nn.Module,
    records: Sequence[StageRecord],
    checkpoints: Checkpoints,
    progress: ProgressReporter,
    *,
    latency: bool,
) -> None:
    recipe, data, original = experiment.recipe, experiment.data, experiment.original
    assert data.mean is not None
    assert data.std is not None
    test = experiment.batches(data.test, experiment.evaluation_batch)
    images = next(iter(test)).images
    example = images[:1]
    normalization = (data.mean, data.std)
    pixels = normalization if recipe.target.input == "uint8" else None
    with TemporaryDirectory() as scratch:
        stages = {
            number: (network, Path(scratch) / f"{number}.onnx")
            for number, network in stage_models(experiment, checkpoints).items()
            if number < len(records)
        }
        files = [(original, folder / "original.onnx"), (compressed, folder / "model.onnx"), *stages.values()]
        progress.start("export", len(files))
        for network, path in files:
            batch = batch_for(network, recipe.target)
            export(
                *(network, example, path),
                classes=data.classes,
                pixels=pixels,
                normalization=normalization,
                batch=batch,
            )
            remove_unsupported_quantizers(path, recipe.target.runtime, images, pixels)
            progress.advance()
        if batch_for(compressed, recipe.target) != recipe.target.batch:
            progress.say(static_batch_reason())
        results, predictions = measure(
            original,
            compressed,
            folder,
            test,
            recipe.target,
            experiment.task,
            seed=recipe.seed,
            progress=progress,
            records=records,
            stages=stages,
            latency=latency,
            mean=data.mean,
            std=data.std,
            classes=data.classes,
        )
        level = _level(experiment, test, predictions["artifact"])
        seen = _seen_validation(experiment, results)
        for warning in (_disagreement(results, compressed), *slower_by_quantization(results), level, seen):
            if warning:
                progress.say(f"warning: {warning}")
    (folder / "numbers.json").write_text(results.to_json())
    evidence = collect_evidence(
        original,
        compressed,
        experiment.teacher,
        experiment.model,
        folder,
        test,
        recipe.target,
        experiment.task,
        predictions=predictions,
        classes=data.classes,
        baseline=results.baseline,
        progress=progress,
    )
    (folder / "evidence.json").write_text(json.dumps(evidence))
    write_report(folder)
    (folder / "recipe.yaml").write_text(recipes.write(recipe))
    write_files(compressed, folder)
    (folder / "checkpoints").mkdir()
    for each in checkpoints.ends():  # copied, not moved: a run that fails here resumes from them
        shutil.copytree(each.path, folder / "checkpoints" / each.path.name)


def _level(experiment: Experiment, test: Batches, predicted: Any) -> str:
    """A sentence about a compressed classifier at chance level; "" for any other."""
    if not isinstance(experiment.task, Classification):
        return ""
    return chance_warning("model.onnx", predicted, targets_of(test), len(experiment.data.classes), COMPRESS_LESS)


def _seen_validation(experiment: Experiment, results: Results) -> str:
    """A sentence if a network that came trained was trained on the validation images; "" for any other."""
    images, validation = len(experiment.data.validation), results.stages[-1].validation_score
    if validation is None or not images or not (experiment.model_is_trained and measures_accuracy(experiment.task)):
        return ""
    test, counts = results.artifact.score, (images, results.test_images)
    if validation - test <= SEEN * error_of_difference((validation, test), counts):
        return ""
    return (
        f"the accuracy on the validation images is {validation:.2f} %, more than three standard errors above the "
        f"{test:.2f} % on the test images. The network was probably trained on the validation images, so do not choose "
        "networks by their validation accuracy."
    )


def _disagreement(results: Results, model: nn.Module) -> str:
    """What a disagreement of the file with torch means for this network; empty if they agree."""
    told, laid = disagreement(results), find_quantizers(model)
    if not told:
        return ""
    coarse = laid is not None and any(
        quantizer.grid.bits < _BYTE
        for quantizer in (*map(laid.of_activation, laid.activations), *map(laid.of_weight, laid.layers))
    )
    if not coarse:
        remedy = "Use another runtime (target.runtime), or keep layers in float with `exclude`."
        return f"{told}. Do not deploy model.onnx. {remedy}"
    return (
        f"{told}. With few bits, rounding a bias to int32 can shift activations of its layer and of the following "
        f"layers by a whole quantization step. Use the {results.metric.name} measured in the runtime."
    )
