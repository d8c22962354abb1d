"""The Python functions for a model and a DataLoader, without a recipe. They use the same methods as recipes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

from torch import Tensor, fx, nn

from tersor.checkpoint.artifact import read_artifact
from tersor.core.errors import CompressionWarning, InputError
from tersor.core.progress import ProgressReporter
from tersor.core.target import Runtime, Target
from tersor.deploy.onnx import export as write_onnx
from tersor.deploy.static_batch import batch_for, static_batch_reason
from tersor.evaluation.executed_precision import unlisted_warning
from tersor.evaluation.latency_ratio import latency_ratio
from tersor.evaluation.session import load_runtime, open_session
from tersor.evaluation.unsupported_quantizers import remove_unsupported_quantizers
from tersor.evaluation.verification import verify
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.ptq import PTQ
from tersor.methods.soft_targets import SoftTargets
from tersor.pipeline.arguments import (
    check_classes,
    check_metadata,
    example_of,
    onnx_path,
    refuse_quantized,
    refuse_shared_weights,
    student_of,
    teacher_of,
    to_compress,
    to_export,
    warn_of_another_runtime,
)
from tersor.pipeline.distillation import train_on_outputs
from tersor.pipeline.file_comparison import compare_files
from tersor.pipeline.normalization import NORMALIZATION, check_values, known_normalization
from tersor.pipeline.outcome_warnings import warn_of_pruned, warn_of_quantized
from tersor.pipeline.task_arguments import Loss, check_targets, task_of
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task
from tersor.training.context import AttachContext
from tersor.training.options import OptimizerOptions, Training


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    bits: int = 8,
    exclude: Sequence[str] = (),
    runtime: Runtime = "onnxruntime",
    task: str | Task | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Module:
    """Quantize a copy of a trained network (post-training quantization); `export` writes it with integer weights.

    A `CompressionWarning` is issued if less than 95 % of the MACs are computed in integers (`integer_coverage` lists
    the operators in float, each with its share of the MACs), if the MACs of some operators cannot be counted, if the
    images contradict `normalization`, and if a classifier is at chance level.

    Args:
        model: a trained network; it is not changed.
        loader: batches of images (N, C, H, W), with or without labels; a few hundred images are enough.
        bits: bits per weight, 2 to 8.
        exclude: names of layers or modules that stay in float, or patterns such as "*.head".
        runtime: the runtime to quantize for.
        task: the task of the network, such as "segmentation"; classification by default.
        normalization: mean and standard deviation of the images. The calibration images are checked against them, and
            `export` stores them in the file.

    Raises:
        InputError: the network is already quantized, cannot be captured, or its forward pass fails; or the batches have
            no images.
    """
    refuse_quantized(model)
    method, target = PTQ(bits=bits, exclude=cast("tuple[str, ...]", exclude)), Target(runtime=runtime)
    network, data, _ = to_compress(model, loader, method.calibration_images)
    told = None if normalization is None else check_values(data, normalization)
    goal = task_of(task) or Classification()
    attached = method.attach(network, AttachContext(data=data, task=goal, target=target))
    attached.begin()
    quantized = cast("fx.GraphModule", attached.model)
    quantized.meta[NORMALIZATION] = told
    warn_of_quantized(quantized, data, goal)
    return quantized


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
    exclude: Sequence[str] = (),
    runtime: Runtime = "onnxruntime",
    task: str | Task | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Remove channels from a copy of a trained network; the remaining weights and BatchNorm statistics are refitted.

    A `CompressionWarning` is issued if the MACs of some operators cannot be counted, or if the result would behave
    differently from the network in later training: without stochastic depth, without its custom `train()`, or with
    gradients other than those of its custom `backward()`.

    Args:
        model: a trained network; it is not changed.
        example: normalized images (N, C, H, W), or batches of them. A few hundred are enough; at most 1,024 are used.
        keep_macs: largest fraction of the MACs to keep; 0.5 by default.
        keep_latency: largest fraction of the latency to keep, instead of `keep_macs`; it is measured at batch size 1 in
            `runtime`, which takes about a minute.
        importance: score of a channel: magnitude, magnitude_l1, fpgm, taylor (needs targets), batchnorm, obs, random.
        scope: `layer` removes the same fraction of the channels in every layer, `global` the least important channels
            of the whole network (works best with `importance="obs"`).
        branches: number of residual branches to remove first: those that change the outputs least per saved MAC.
        round_to: the number of remaining channels is a multiple of this.
        exclude: names of layers or modules whose channels are not removed, or patterns such as "*.conv1".
        runtime: the runtime in which latency is measured.
        task: the task of the network, such as "segmentation". `taylor` uses its loss, `obs` and `branches` its logits.
            By default classification, or distance with `loss`.
        loss: (outputs, targets) -> scalar tensor, instead of the task's loss.

    Raises:
        InputError: too few channels can be removed (the message names the layers), or the forward pass fails.
    """
    budget: dict[str, Any] = {"keep_macs": keep_macs, "keep_latency": keep_latency}
    ranking: dict[str, Any] = {"importance": importance, "scope": scope, "exclude": exclude}
    method = ChannelPruning(**budget, **ranking, branches=branches, round_to=round_to)
    target = Target(runtime=runtime)
    network, data, first = to_compress(model, example, max(method.estimation_images, method.importance_images))
    goal = task_of(task, loss) or Classification()
    if method.importance == "taylor":
        check_targets(goal, network, data, method.importance_images)
    attached = method.attach(network, AttachContext(data=data, task=goal, target=target, latency=latency_ratio))
    attached.begin()
    warn_of_pruned(model, attached.model, first)
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
    optimizer: Literal["sgd", "adamw"] = "sgd",
    learning_rate: float | None = None,
    progress: ProgressReporter | None = None,
    task: str | Task | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Train a student on the outputs of a teacher; it is returned in eval mode.

    Logits are softened (Hinton et al., 2015). For all other outputs, the relative squared error is minimized.

    Args:
        student: the network to train, in place.
        teacher: a trained network for the same images, with outputs of the same shapes.
        loader: batches (images, targets); must have a length. Targets may be left out if `label_weight` is 0, or if the
            outputs are not logits (N, classes) and neither `task` nor `loss` is given.
        epochs: passes over `loader`.
        temperature: temperature T of the softened outputs.
        loss_weight: weight of the loss between student and teacher.
        label_weight: weight of the task's loss, such as the cross entropy with the labels.
        optimizer: SGD with momentum, or AdamW; usually the one that the teacher was trained with.
        learning_rate: peak learning rate, before cosine decay; by default 0.05 for sgd and 0.0005 for adamw.
        progress: receives the progress.
        task: the task of the networks; by default classification for logits (N, classes) without `loss`, else distance.
        loss: (outputs, targets) -> scalar tensor, instead of the task's loss.

    Raises:
        InputError: an argument, a network or a batch cannot be used, or a loss is not finite.
    """
    if not isinstance(loader, Sized):
        raise InputError("distill needs a loader with a length, such as a DataLoader over a map-style data set.")
    student, teacher = student_of(student), teacher_of(teacher)
    refuse_shared_weights(student, teacher)
    if not isinstance(epochs, int) or epochs < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"epochs is {epochs}. Write a whole number, 1 or more.")
    method = SoftTargets(temperature=temperature, loss_weight=loss_weight, label_weight=label_weight)
    rate = {"sgd": 0.05, "adamw": 0.0005}.get(optimizer) if learning_rate is None else learning_rate
    training = Training(optimizer=OptimizerOptions(name=optimizer, learning_rate=rate))
    asked = task_of(task, loss)
    return train_on_outputs(student, teacher, loader, method, training, epochs=epochs, task=asked, progress=progress)


def export(
    model: nn.Module,
    example: Any,
    path: Path | str,
    *,
    runtime: Runtime = "onnxruntime",
    classes: Sequence[str] = (),
    pixels: tuple[Sequence[float], Sequence[float]] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    batch: int | None = None,
) -> Path:
    """Write a network to one ONNX file and compare its outputs in `runtime` with those in torch, on `example`.

    A `CompressionWarning` is issued if the outputs differ by more than usual, if `quantize` was called with another
    runtime, if the file leaves out quantizers or the runtime computes quantized layers in float, or if the values of
    `example` contradict the normalization.

    Args:
        model: any network; the result of `quantize` is written with integer weights and operators.
        example: normalized images (N, C, H, W); several inputs are a tuple, or a dict by name.
        path: the file to write, `*.onnx`.
        runtime: the runtime for the comparison.
        classes: class names in the order of the logits, stored in the metadata.
        pixels: mean and standard deviation of the normalization; the file then takes uint8 pixels.
        normalization: mean and standard deviation that the images were normalized with, stored in the metadata for
            `tersor eval`; by default those given to `quantize`.
        batch: fixed batch size; by default it is dynamic, or 1 with a warning if the network needs a fixed size or the
            installed OpenVINO would crash.

    Raises:
        InputError: the network cannot be converted, the runtime is not installed or cannot run the file, or the
            outputs differ by more than rounding can explain. In these cases no file is written.
    """
    path = onnx_path(path)
    warn_of_another_runtime(model, runtime)
    images = example_of(example).cpu().float()
    pixels = check_metadata(classes, pixels, images)
    told = known_normalization(model, normalization, pixels, images)
    network = to_export(model, images, "the network")
    fixed = batch_for(network, Target(runtime=runtime, batch=batch))
    if fixed != batch:
        warnings.warn(static_batch_reason(), CompressionWarning, stacklevel=2)
    try:  # a file that the runtime rejects must not replace an existing one
        with TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            write_onnx(network, images, written, classes=classes, pixels=pixels, normalization=told, batch=fixed)
            remove_unsupported_quantizers(written, runtime, images, pixels)
            session = open_session(written, runtime)
            check_classes(session, classes)
            verify(session, network, images, pixels, lambda: open_session(written, runtime, precision="float32"))
            if (warning := unlisted_warning(written, runtime, network, images)) is not None:
                warnings.warn(warning, CompressionWarning, stacklevel=2)
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
    task: str | Task | None = None,
    metric: Any = None,
) -> dict[str, Any]:
    """Measure two networks in a runtime: metric (such as "accuracy"), prediction agreement, file size and latency.

    A `CompressionWarning` is issued if a classifier is at chance level, or if the values of the images contradict the
    normalization in the metadata of a file.

    Args:
        original: a network, or its ONNX file.
        artifact: an ONNX file, or the folder of a run or a search.
        loader: batches (images, targets) in the input format of the files; without targets, the metric is None. For
            files that take uint8 pixels, normalized images are converted to pixels.
        runtime: the runtime for both.
        seconds: time limit per batch size for measuring the latency, in interleaved rounds.
        task: the task; by default classification for logits (N, classes) without `metric`, else distance.
        metric: (outputs, targets) -> number, averaged over the images, or a torchmetrics Metric; by default the task's.

    Returns:
        The entries `original` and `artifact`, each with the metric under its name, `agreement` with the original in
        percent, `bytes`, `compressed_bytes` (after gzip), and `latency_ms` in milliseconds by batch size: `median`,
        `p10`, `p90`, `n`. The artifact also has `difference`, its metric minus that of the original;
        `difference_error`, the standard error of `difference` in points (None unless the metric is the accuracy); and
        `speedup` over the original by batch size: `value`, the 95 % interval `low` to `high`, the number of rounds,
        `n`, and the number of groups that the rounds are divided into, `groups`.

    Raises:
        InputError: a file or a batch cannot be used.
    """
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}. Write a finite number above 0.")
    if not isinstance(artifact, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"the artifact is of type {type(artifact).__name__}. Export it and pass the path of the file.")
    load_runtime(runtime)
    compressed = read_artifact(artifact).model
    asked = task_of(task, metric=metric)
    return compare_files(original, compressed, loader, asked, runtime=runtime, seconds=seconds)
