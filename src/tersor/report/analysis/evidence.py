"""The content of `evidence.json`: what the report shows of the networks, which exist only during the run.

Except for timings, it depends only on the networks, the files and the images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.core.progress import ProgressReporter
from tersor.core.target import Target
from tersor.data import Batches
from tersor.deploy.static_batch import batch_for
from tersor.evaluation.measurement import arrays
from tersor.evaluation.node_profile import profile
from tersor.evaluation.results import Execution
from tersor.evaluation.scoring import targets_of
from tersor.evaluation.session import Array
from tersor.graph.capture import capture, layer_of, values_into
from tersor.graph.layer_selection import Layer, weighted_layers
from tersor.report.analysis.attention_maps import attention_maps
from tersor.report.analysis.changed_outputs import compare_outputs
from tersor.report.analysis.layers import layer_table
from tersor.report.analysis.predictions import class_similarity, compare_predictions, evenly_spaced, soft_targets
from tersor.report.analysis.pruning import masks, widths
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task

PROFILED_BATCH_SIZES = (1, 32)

_OBSERVED_IMAGES = 256
"""Test images that layers are observed on, and that examples are chosen from."""


def collect_evidence(
    original: nn.Module,
    model: nn.Module,
    teacher: nn.Module | None,
    before: nn.Module,
    folder: Path,
    test: Batches,
    target: Target,
    task: Task,
    *,
    predictions: Mapping[str, Any],
    classes: Sequence[str],
    baseline: Mapping[str, Execution],
    progress: ProgressReporter,
) -> dict[str, Any]:
    """The content of `evidence.json`, in plain values.

    Args:
        original: the network before compression.
        model: the compressed network in torch, with its masks and quantizers.
        teacher: the network whose soft targets are shown; `original` if None.
        before: the network before the first stage, for the comparison of attention and widths.
        folder: contains `original.onnx` and `model.onnx`.
        test: the whole test set, in order.
        target: the runtime to profile.
        task: the task of the networks.
        predictions: `original` and `artifact` -> predictions for the test images, in the runtime.
        classes: names of the classes.
        baseline: batch size -> `runtime` and `precision` of the baseline, as in `numbers.json`; nothing is profiled if
            it is empty.
        progress: receives the progress.

    Returns:
        `layers` (see `layer_table`), `widths` and `masks` (see the functions of these names), `profile` (batch size ->
        `original`, `artifact` and `baseline`, see `profile`), `attention` (see `attention_maps`), and the number of
        `observed_images`. For classifiers, `soft_targets` (name of the `network`, `images`, see `soft_targets`, and
        `class_similarity`, see the function of this name) and `predictions` (see `compare_predictions`); for other
        networks, `outputs` (see `compare_outputs`).
    """
    progress.start("evidence", 2)
    # evenly over the whole set: image folders are sorted by class
    index = evenly_spaced(len(test.images), _OBSERVED_IMAGES)
    images = test.take(index).only_images
    original, model = _eval_copy(original), _eval_copy(model)
    layers = layer_table(_with_layers_of(model, original, images), model, images)
    source = original if teacher is None else _eval_copy(teacher)
    predicted = _predicted(task, test, classes, predictions)
    if isinstance(task, Classification):
        predicted["soft_targets"] = {
            "network": "original" if teacher is None else "teacher",
            "images": soft_targets(source, test, index),
            "class_similarity": class_similarity(source, test),
        }
    before = _eval_copy(before)
    networks = {"before": before, "after": model}
    attention = attention_maps(networks if teacher is None else {"teacher": source, **networks}, test, index)
    progress.advance()
    image = next(arrays(test, target.input))[:1]
    profiles = _profiles(original, model, images, folder, image, target, baseline) if baseline else {}
    progress.advance()
    return {
        "observed_images": len(images),
        "layers": layers,
        "widths": widths(_with_layers_of(model, before, images), model),
        "masks": masks(model),
        "profile": profiles,
        "attention": attention,
        "soft_targets": None,
        "predictions": None,
        **predicted,
    }


def _predicted(task: Task, test: Batches, classes: Sequence[str], predictions: Mapping[str, Any]) -> dict[str, Any]:
    before, after = predictions["original"], predictions["artifact"]
    if isinstance(task, Classification):
        return {"predictions": compare_predictions(test.images, before.numpy(), after.numpy())}
    targets = None if task.from_original else targets_of(test)
    return {"outputs": compare_outputs(task, test.images, classes, targets, before, after)}


def _eval_copy(network: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU, so that the network itself does not change."""
    return copy.deepcopy(network).cpu().float().eval()


def _with_layers_of(model: nn.Module, network: nn.Module, images: Tensor) -> nn.Module:
    """`network`, captured if `model` is: operators that became layers in one have the same names in the other."""
    return capture(network, images) if isinstance(model, fx.GraphModule) else network


def _profiles(
    original: nn.Module,
    model: nn.Module,
    images: Tensor,
    folder: Path,
    image: Array,
    target: Target,
    baseline: Mapping[str, Execution],
) -> dict[str, Any]:
    before, after = (layers_by_module(network, images) for network in (original, model))
    profiles: dict[str, Any] = {}
    fixed = batch_for(model, target)
    for size in PROFILED_BATCH_SIZES if fixed is None else (fixed,):
        batch = np.ascontiguousarray(np.repeat(image, size, axis=0))
        original_file, fastest = folder / "original.onnx", baseline[str(size)]
        in_float32 = profile(original_file, target.runtime, batch, before, precision="float32")
        same = (fastest.runtime, fastest.precision) == (target.runtime, "float32")
        profiles[str(size)] = {
            "original": in_float32,
            "artifact": profile(folder / "model.onnx", target.runtime, batch, after),
            "baseline": in_float32 if same else profile(original_file, fastest.runtime, batch, before),
        }
    return profiles


def layers_by_module(network: nn.Module, images: Tensor) -> dict[str, str]:
    """Layers by their own path and by the path of the BatchNorm after them: a folded node may have either name.

    Args:
        network: a network in eval mode, on the CPU.
        images: (N, C, H, W), to capture it with.
    """
    names = {name: name for name in weighted_layers(network)}
    try:
        graph = capture(network, images)
    except InputError:  # some networks can be exported but not captured; their folded layers have no name
        return names
    for node in graph.graph.nodes:
        if isinstance(layer_of(node), nn.BatchNorm2d | nn.BatchNorm1d):
            layer = values_into(node)[0]
            if isinstance(layer_of(layer), Layer):
                names[str(node.target)] = str(layer.target)
    return names
