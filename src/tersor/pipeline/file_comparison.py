"""Two networks in one runtime, on the batches of a user's loader: what `tersor.compare` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.target import Runtime
from tersor.data.batch import images_of
from tersor.data.loader import batches_of, targets_in
from tersor.data.network_inputs import NetworkInput
from tersor.deploy.onnx import export
from tersor.evaluation.file_inputs import FileArrays
from tersor.evaluation.latency import BATCH_SIZES, compressed_bytes, measure_latency, size_bytes
from tersor.evaluation.scoring import agreement, arrays_of, file_outputs, file_predictions, score
from tersor.evaluation.session import Session, open_session
from tersor.evaluation.standard_error import error_of_drop, measures_accuracy, right_of
from tersor.evaluation.verification import pixels_of
from tersor.pipeline.arguments import to_export
from tersor.pipeline.artifact_settings import normalization_in
from tersor.pipeline.normalization import check_values
from tersor.pipeline.outcome_warnings import warn_of_chance
from tersor.pipeline.task_arguments import targets_for, task_of_files
from tersor.tasks.task import Task


def compare_files(
    original: nn.Module | Path | str,
    compressed: Path,
    loader: Iterable[Any],
    task: Task | None,
    *,
    runtime: Runtime,
    seconds: float,
) -> dict[str, Any]:
    """The measurements of `original` and `artifact`; see `tersor.compare`.

    Raises:
        InputError: a file or a batch cannot be used.
    """
    loader, _ = batches_of(loader)
    batches = [(images.cpu(), targets_in(batch)) for batch in loader if len(images := images_of(batch))]
    first = batches[0][0]
    if isinstance(original, nn.Module):
        original = to_export(original, first.float(), "original")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "original.onnx" if isinstance(original, nn.Module) else Path(original)
        if isinstance(original, nn.Module):
            export(original, first, path)
        files = {"original": path, "artifact": compressed}
        _check_normalization(files.values(), [images for images, _ in batches])
        sessions = {name: open_session(file, runtime) for name, file in files.items()}
        arrays = {name: _input_format(files[name], session, first) for name, session in sessions.items()}
        few = {name: arrays[name](first[:2]) for name in files}
        goal = task_of_files(task, sessions, few)
        predictions = {
            name: file_predictions(session, (arrays[name](each) for each, _ in batches), goal)
            for name, session in sessions.items()
        }
        outputs = file_outputs(sessions["original"], few["original"])
        targets = targets_for(goal, batches, outputs)
        warn_of_chance(goal, predictions, targets, outputs)
        if goal.from_original:
            targets = predictions["original"]
        openers = {name: partial(open_session, file, runtime) for name, file in files.items()}
        timings = measure_latency(openers, {name: few[name][:1] for name in files}, seconds=seconds)
        found: dict[str, dict[str, Any]] = {
            name: {
                goal.metric: None if targets is None else score(goal, predictions[name], targets),
                "agreement": agreement(goal, predictions[name], predictions["original"]),
                "bytes": size_bytes(files[name]),
                "compressed_bytes": compressed_bytes(files[name]),
                "latency_ms": {str(size): asdict(timings.spread(name, size)) for size in BATCH_SIZES},
            }
            for name in files
        }
    before, after = (each[goal.metric] for each in found.values())
    found["artifact"]["difference"] = None if targets is None else after - before
    found["artifact"]["difference_error"] = _difference_error(goal, predictions, targets, after)
    ratios = {str(size): timings.ratio("original", "artifact", size) for size in BATCH_SIZES}
    found["artifact"]["speedup"] = {size: asdict(ratio) for size, ratio in ratios.items()}
    return found


def _difference_error(task: Task, predictions: Mapping[str, Any], targets: Any, metric: float) -> float | None:
    """One standard error of the difference of the accuracies, in points; None for other metrics and without targets."""
    if targets is None or not measures_accuracy(task):
        return None
    before, after = (right_of(task, predictions[name], targets) for name in ("original", "artifact"))
    return error_of_drop(after, before, metric, len(targets))


def _check_normalization(files: Iterable[Path], batches: Sequence[NetworkInput]) -> None:
    """Warn if the images cannot have the normalization in the metadata of a file."""
    for file in files:
        told = normalization_in(file)
        if {"mean", "std"} <= told.keys() and isinstance(batches[0], Tensor) and batches[0].is_floating_point():
            check_values(batches, (told["mean"], told["std"]), "the images", stacklevel=6)
            return


def _input_format(file: Path, session: Session, images: NetworkInput) -> Callable[[NetworkInput], FileArrays]:
    """From images of the loader to the input of a file: their pixels, if it takes uint8 and they are normalized.

    Raises:
        InputError: it takes uint8, and the normalization of the images is unknown.
    """
    if session.input_dtype != np.uint8 or not isinstance(images, Tensor) or not images.is_floating_point():
        return arrays_of
    told = normalization_in(file)
    if "mean" not in told or "std" not in told:
        raise InputError(
            f"{file} takes uint8 pixels, but the batches are {images.dtype}, and its metadata does not contain the "
            "normalization. Export it again with tersor.export(..., pixels=(mean, std)), which stores it, or pass "
            "batches of uint8 pixels and an original that takes them too."
        )

    def arrays(batch: NetworkInput) -> FileArrays:
        assert isinstance(batch, Tensor)
        return arrays_of(pixels_of(batch, (told["mean"], told["std"])))

    return arrays
