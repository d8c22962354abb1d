"""The verbs for one who has a model and a DataLoader and wants no recipe. Each is a thin call of the same methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError
from torch import Tensor, nn

from tersor.checkpoint.artifact import read_artifact
from tersor.core.errors import CompressionWarning, InputError
from tersor.core.progress import ProgressReporter
from tersor.core.target import Runtime, Target
from tersor.data.batch import images_of
from tersor.data.loader import Loader, batches_of, given_labels
from tersor.deploy.onnx import export as write_onnx
from tersor.deploy.static_batch import batch_for, static_batch_reason
from tersor.evaluation.latency import BATCH_SIZES, Array, compressed_bytes, measure_latency, predictions, size_bytes
from tersor.evaluation.latency_ratio import latency_ratio
from tersor.evaluation.session import open_session
from tersor.evaluation.verification import verify
from tersor.graph.eval_mode import evaluating
from tersor.graph.fused_inference import fused
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.ptq import PTQ
from tersor.methods.soft_targets import SoftTargets
from tersor.pipeline.arguments import (
    all_labels,
    check_classes,
    check_labels,
    check_metadata,
    check_same_logits,
    classes_of_both,
    example_of,
    labelled,
    onnx_path,
    refuse_shared_weights,
    student_of,
    teacher_of,
    to_compress,
    to_export,
)
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.training.context import AttachContext
from tersor.training.loop import fit, steps_per_epoch
from tersor.training.options import OptimizerOptions, Training
from tersor.training.teacher_check import IMAGES as TEACHER_IMAGES
from tersor.training.teacher_check import doubts

_T = TypeVar("_T")


def quantize(model: nn.Module, loader: Iterable[Any], *, bits: int = 8, runtime: Runtime = "onnxruntime") -> nn.Module:
    """Post-training quantization of a copy of `model`; `export` writes it as an integer network.

    Warns with a `CompressionWarning` where less than 95 % of the MACs are in integers;
    `integer_coverage(quantized, images)` lists what stays in float, with the reasons.

    Args:
        model: a trained network; it stays as it is.
        loader: batches of images (N, C, H, W), with or without labels; a few hundred images suffice.
        bits: of weights.
        runtime: what will execute the result.

    Raises:
        InputError: the network cannot be captured, or does not run on the batches, or they hold no images.
    """
    method, target = _made(PTQ, bits=bits), _made(Target, runtime=runtime)
    network, data = to_compress(model, loader, method.calibration_images)
    attached = method.attach(network, AttachContext(data=data, target=target))
    attached.begin()
    warning = calibrated_coverage(attached.model).warning
    if warning is not None:
        warnings.warn(warning, CompressionWarning, stacklevel=2)
    return attached.model


def prune(
    model: nn.Module,
    example: Tensor | Iterable[Any],
    *,
    keep_macs: float | None = None,
    keep_latency: float | None = None,
    importance: str = "magnitude",
    scope: str = "layer",
    branches: int = 0,
    round_to: int = 8,
    runtime: Runtime = "onnxruntime",
) -> nn.Module:
    """Removes channels from a copy of `model`; layers that read them and BatchNorm's statistics are fitted to it.

    Args:
        model: a trained network; it stays as it is.
        example: images (N, C, H, W), normalised as for `model`, or batches of them: a few hundred, 1,024 at most.
        keep_macs: fraction of the MACs that stays at most; 0.5 if none is given.
        keep_latency: in its place, of the latency as measured here, at batch size 1 in `runtime`; it takes a minute.
        importance: which channels go first; `taylor` needs batches with labels.
        scope: `layer`, the same fraction everywhere, or `global`, the least important anywhere (best with `obs`).
        branches: residual branches that go whole before, those least missed.
        round_to: channels that stay are a multiple of it.
        runtime: where latency is measured.

    Raises:
        InputError: no channel can be removed, or not as many (the layers that stay are named); an image is not as the
            network wants it.
    """
    options = {"keep_macs": keep_macs, "keep_latency": keep_latency, "importance": importance, "scope": scope}
    method = _made(ChannelPruning, **options, branches=branches, round_to=round_to)
    target = _made(Target, runtime=runtime)
    network, data = to_compress(model, example, max(method.estimation_images, method.importance_images))
    if method.importance == "taylor":
        check_labels(network, data, method.importance_images)
    attached = method.attach(network, AttachContext(data=data, target=target, latency=latency_ratio))
    attached.begin()
    return attached.model


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 1,
    temperature: float = 4.0,
    loss_weight: float = 0.9,
    label_weight: float = 0.1,
    learning_rate: float = 0.05,
    progress: ProgressReporter | None = None,
) -> nn.Module:
    """Trains `student` on the softened answers of `teacher`; the student comes back in eval.

    Args:
        student: the network that learns, in place.
        teacher: a trained network for the same images and classes.
        loader: with a length; batches (images, labels), or of images alone where `label_weight` is 0.
        epochs: rounds through `loader`.
        temperature: T of the softened answers.
        loss_weight: of the soft targets.
        label_weight: of the labels' cross entropy.
        learning_rate: highest rate of SGD with momentum, which follows a cosine.
        progress: reports the progress.

    Raises:
        InputError: a batch is not as described, or a loss is not finite.
    """
    if not isinstance(loader, Sized):
        raise InputError("distill needs a loader with a length, such as a DataLoader over a data set.")
    student, teacher = student_of(student), teacher_of(teacher)
    refuse_shared_weights(student, teacher)
    if not isinstance(epochs, int) or epochs < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"epochs is {epochs}. Write a whole number, 1 or more.")
    method = _made(SoftTargets, temperature=temperature, loss_weight=loss_weight, label_weight=label_weight)
    training = Training(optimizer=_made(OptimizerOptions, learning_rate=learning_rate))
    loader, first = batches_of(loader)
    few = first[:8].to(next(teacher.parameters()).device)
    classes = classes_of_both(student, teacher, first)
    batches = Loader(loader, classes if label_weight else None)
    for doubt in doubts("the teacher", teacher, labelled(loader, classes, TEACHER_IMAGES)):
        warnings.warn(doubt, CompressionWarning, stacklevel=2)
    attached = method.attach(student, AttachContext(teacher=teacher))
    steps = epochs * steps_per_epoch(batches, training)
    learning = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    try:
        with evaluating(teacher):
            fit(
                attached,
                batches,
                training,
                steps=steps,
                teacher=fused(teacher, few),
                progress=progress,
            )
    finally:
        for parameter in learning:
            parameter.requires_grad = True
    return attached.model


def export(
    model: nn.Module,
    example: Tensor,
    path: Path | str,
    *,
    runtime: Runtime = "onnxruntime",
    classes: Sequence[str] = (),
    pixels: tuple[Sequence[float], Sequence[float]] | None = None,
    batch: int | None = None,
) -> Path:
    """Writes `model` as one ONNX file, and compares it in `runtime` with torch on `example`.

    A `CompressionWarning` says that the outputs differ by more than is usual.

    Args:
        model: any network; one that `quantize` gave becomes an integer network.
        example: images (N, C, H, W), normalised as for `model`.
        path: file to write, `*.onnx`.
        runtime: where it is tried.
        classes: names of the classes, for the file's metadata.
        pixels: mean and standard deviation; the file then takes uint8 pixels.
        batch: images a batch; by default any number, or 1 with a warning where the installed OpenVINO would crash.

    Raises:
        InputError: the network cannot be converted, the runtime is not installed or cannot run it, or the outputs
            differ by more than rounding explains; then no file is left.
    """
    path = onnx_path(path)
    images = example_of(example).cpu().float()
    check_metadata(classes, pixels, images.shape[1])
    network = to_export(model, images, "the network")
    fixed = batch_for(network, _made(Target, runtime=runtime, batch=batch))
    if fixed != batch:
        warnings.warn(static_batch_reason(), CompressionWarning, stacklevel=2)
    try:  # what the runtime refuses is not left, nor written over a file
        with TemporaryDirectory(dir=path.parent) as folder:
            written = write_onnx(network, images, Path(folder) / path.name, classes=classes, pixels=pixels, batch=fixed)
            session = open_session(written, runtime)
            check_classes(session, classes)
            verify(session, network, images, pixels)
            written.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error
    return path


def compare(
    original: nn.Module | Path | str,
    artifact: Path | str,
    loader: Iterable[Any],
    *,
    runtime: Runtime = "onnxruntime",
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Measures two networks side by side in the runtime: accuracy, agreement, bytes as they lie and deflated, latency.

    Args:
        original: a network, or its ONNX file.
        artifact: an ONNX file, or the folder of a run.
        loader: batches (images, labels) as the files take them; without labels, accuracy is None.
        runtime: where both run.
        seconds: time for the latency of one batch size.

    Raises:
        InputError: a file or a batch cannot be used.
    """
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}. Write a number above 0.")
    if not isinstance(artifact, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"the artifact is a {type(artifact).__name__}. Export it, and pass the path of its file.")
    loader, _ = batches_of(loader)
    batches = [(images.cpu(), given_labels(batch)) for batch in loader if len(images := images_of(batch))]
    if not isinstance(original, str | Path):
        original = to_export(original, batches[0][0].float(), "original")
    with TemporaryDirectory() as folder:
        path = original if isinstance(original, str | Path) else Path(folder) / "original.onnx"
        if isinstance(original, nn.Module):
            write_onnx(original, batches[0][0], path)
        files = {"original": Path(path), "artifact": read_artifact(artifact).model}
        sessions = {name: open_session(file, runtime) for name, file in files.items()}
        check_same_logits(sessions, next(_arrays(batches))[:2])
        answers = {name: predictions(session, _arrays(batches)) for name, session in sessions.items()}
        labels = all_labels(batches, max(2, sessions["original"].run(next(_arrays(batches))).shape[1]))
        openers = {name: partial(open_session, file, runtime) for name, file in files.items()}
        timings = measure_latency(openers, next(_arrays(batches))[:1], seconds=seconds)
        return {
            name: {
                "accuracy": None if labels is None else 100 * float((answers[name] == labels).mean()),
                "agreement": 100 * float((answers[name] == answers["original"]).mean()),
                "bytes": size_bytes(files[name]),
                "compressed_bytes": compressed_bytes(files[name]),
                "latency_ms": {str(size): asdict(timings.spread(name, size)) for size in BATCH_SIZES},
            }
            for name in files
        }


def _arrays(batches: Sequence[tuple[Tensor, Tensor | None]]) -> Iterator[Array]:
    return (np.ascontiguousarray(images.numpy()) for images, _ in batches)


def _made(kind: Callable[..., _T], **parameters: Any) -> _T:
    """A method or record of these parameters; what is wrong with them is told as to any user."""
    try:
        return kind(**parameters)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(f"{wrong['loc'][0]}: {wrong['msg']}, given {wrong['input']!r}.") from None
