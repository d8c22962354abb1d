"""A tiny classifier as an ONNX file, and its expected outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tersor.core.target import Target
from tersor.graph.parametrization import parametrized
from tersor.quantization.fake_quantize import FakeQuantize, weight_quantizer
from tersor.quantization.grid import Grid, affine_parameters
from tersor.quantization.observers import without_saturation

CLASSES = 5


@dataclass(frozen=True)
class Tiny:
    """Takes images (N, 3, 8, 8) float32, returns logits (N, 5)."""

    path: Path
    images: np.ndarray
    logits: np.ndarray


def tiny_proto(generator: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    weights = {
        "kernel": generator.standard_normal((4, 3, 1, 1), np.float32),
        "matrix": generator.standard_normal((4, CLASSES), np.float32),
        "bias": generator.standard_normal(CLASSES, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["mixed"]),
        helper.make_node("Relu", ["mixed"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "matrix", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), weights


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    generator = np.random.default_rng(0)
    proto, weights = tiny_proto(generator)
    path = tmp_path / "tiny.onnx"
    onnx.save(proto, path)
    images = generator.standard_normal((6, 3, 8, 8), np.float32)
    mixed = np.einsum("nchw,oc->nohw", images, weights["kernel"][:, :, 0, 0])
    features = np.maximum(mixed, 0).mean(axis=(2, 3))
    return Tiny(path, images, features @ weights["matrix"] + weights["bias"])


@pytest.fixture(scope="session")
def on_affine_grids() -> Callable[..., torch.nn.Module]:
    """A function that shifts the weights of a quantized network and quantizes them with zero points."""

    def lay(network: torch.nn.Module, bits: int, *, per_tensor: bool, runs: bool = False) -> torch.nn.Module:
        grid = Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for layer in [module for module in network.modules() if weight_quantizer(module) is not None]:
            weights = parametrized(layer)
            shown = weights.original.data
            shown += 0.7 * shown.std()
            low, high = torch.aminmax(shown) if per_tensor else torch.aminmax(shown.flatten(1), dim=1)
            weights[0] = FakeQuantize(grid, None if per_tensor else len(shown))
            scale, zero_point = affine_parameters(low, high, grid)
            if runs and Target().cpu == "avx2":  # a file that is run on this machine must not saturate
                scale = without_saturation(shown, scale, grid)
            weights[0].set_grid(scale, zero_point)
        return network

    return lay


def scaling_file(path: Path, factor: float) -> Path:
    """Write a file that multiplies images (N, 3, 8, 8) by a number."""
    node = helper.make_node("Mul", ["images", "factor"], ["maps"])
    images, maps = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8]) for name in ("images", "maps")
    )
    weight = numpy_helper.from_array(np.float32(factor), "factor")
    graph = helper.make_graph([node], "scaling", [images], [maps], [weight])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path
