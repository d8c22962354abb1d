"""What only the live run has, gathered for the report: `evidence.json`. All of it but timings depends on nothing else
than the networks, the files and the images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.progress import ProgressReporter
from tersor.core.target import Target
from tersor.data import Batches
from tersor.deploy.static_batch import batch_for
from tersor.evaluation.node_profile import profile
from tersor.evaluation.results import arrays
from tersor.evaluation.session import Array
from tersor.graph.capture import capture, layer_of, values_into
from tersor.graph.layer_selection import Layer, weighted_layers
from tersor.report.analysis.attention_maps import attention_maps
from tersor.report.analysis.layers import layer_table
from tersor.report.analysis.predictions import changed_answers, similar_classes, softened_targets
from tersor.report.analysis.pruning import masks, widths

PROFILED_BATCH_SIZES = (1, 32)

_LOOKED_AT = 256
"""Images of the test set that layers are observed on, and that softened targets are chosen from."""


def gather(
    original: nn.Module,
    model: nn.Module,
    teacher: nn.Module | None,
    before: nn.Module,
    folder: Path,
    test: Batches,
    target: Target,
    *,
    answers: Mapping[str, Array],
    baseline: Mapping[str, Mapping[str, str]],
    progress: ProgressReporter,
) -> dict[str, Any]:
    """The content of `evidence.json`, in plain values.

    Args:
        original: the network as it came in.
        model: the compressed one, as torch has it, with masks and quantizers on it.
        teacher: whose softened targets are shown; those of `original` where there is none.
        before: the network before the first stage, whose attention and widths are shown beside.
        folder: holds `original.onnx` and `model.onnx`.
        test: the whole test set, in order.
        target: the runtime that answers and is profiled.
        answers: of `original` and `artifact` (N,) to the test images, in the runtime.
        baseline: batch size -> `runtime` and `precision` of the baseline, as in `numbers.json`.
        progress: reports the progress.

    Returns:
        `layers` (see `layer_table`), `widths` and `masks` (see there), `profile` (batch size -> `original`, `artifact`
        and `baseline`, see `profile`), `targets` (`of` whom, `images`, see `softened_targets`, and `similar`, see
        `similar_classes`), `attention` (see `attention_maps`), `answers` (see `changed_answers`), `looked_at`.
    """
    progress.start("evidence", 3)
    # over the whole set, which is sorted by class where it is a folder
    index = torch.linspace(0, len(test.images) - 1, min(_LOOKED_AT, len(test.images))).round().long()
    looked_at = test.take(index).images
    changed = changed_answers(test.images, answers["original"], answers["artifact"])
    progress.advance()
    original, model = _at_rest(original), _at_rest(model)
    layers = layer_table(original, model, looked_at)
    teaches = original if teacher is None else _at_rest(teacher)
    targets = {
        "of": "original" if teacher is None else "teacher",
        "images": softened_targets(teaches, test, index),
        "similar": similar_classes(teaches, test),
    }
    before = _at_rest(before)
    seen = {"before": before, "after": model}
    attention = attention_maps(seen if teacher is None else {"teacher": teaches, **seen}, test, index)
    progress.advance()
    profiles = _profiles(original, model, folder, next(arrays(test, target.input))[:1], target, baseline)
    progress.advance()
    return {
        "looked_at": len(looked_at),
        "layers": layers,
        "widths": widths(before, model),
        "masks": masks(model),
        "profile": profiles,
        "targets": targets,
        "attention": attention,
        "answers": changed,
    }


def _at_rest(network: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU: what is looked at stays as it was."""
    return copy.deepcopy(network).cpu().float().eval()


def _profiles(
    original: nn.Module,
    model: nn.Module,
    folder: Path,
    image: Array,
    target: Target,
    baseline: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    before, after = _layers_by_module(original), _layers_by_module(model)
    found: dict[str, Any] = {}
    fixed = batch_for(model, target)
    for size in PROFILED_BATCH_SIZES if fixed is None else (fixed,):
        batch = np.ascontiguousarray(np.repeat(image, size, axis=0))
        initial_model, fastest = folder / "original.onnx", baseline[str(size)]
        in_float32 = profile(initial_model, target.runtime, batch, before, precision="float32")
        same = (fastest["runtime"], fastest["precision"]) == (target.runtime, "float32")
        found[str(size)] = {
            "original": in_float32,
            "artifact": profile(folder / "model.onnx", target.runtime, batch, after),
            "baseline": in_float32 if same else profile(initial_model, fastest["runtime"], batch, before),
        }
    return found


def _layers_by_module(network: nn.Module) -> dict[str, str]:
    """Layers by their own path and by that of the BatchNorm behind, which names the two once they are folded."""
    names = {name: name for name in weighted_layers(network)}
    try:
        graph = capture(network)
    except InputError:  # what cannot be captured can be exported; its folded layers then go unnamed
        return names
    for node in graph.graph.nodes:
        if isinstance(layer_of(node), nn.BatchNorm2d | nn.BatchNorm1d):
            layer = values_into(node)[0]
            if isinstance(layer_of(layer), Layer):
                names[str(node.target)] = str(layer.target)
    return names
