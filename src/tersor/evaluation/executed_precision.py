"""Layers that a runtime computes in float although the file stores their weights as integers.

`integer_coverage` predicts from the graph which layers a runtime computes in integers. Here the runtime's own optimized
graph is read, so that a layer for which the prediction is wrong is named too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.machine import default_threads
from tersor.data.network_inputs import NetworkInput
from tersor.deploy.file_layers import MOST_BITS, file_layers
from tersor.evaluation.node_profile import layer_of_node
from tersor.evaluation.session import load_runtime, onnxruntime_options, openvino_compiled, openvino_config
from tersor.quantization.integer_coverage import integer_coverage

_FLOAT_PRODUCTS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
_OPENVINO_PRODUCTS = {"Convolution", "FullyConnected", "MatMul"}
_FLOAT_PRECISIONS = {"f32", "bf16", "f16"}
_OF_ACTIVATIONS = {"matmul", "bmm", "mm", "baddbmm", "einsum", "scaled_dot_product_attention"}
"""Products that are listed under the module whose forward method computes them, and say nothing about its layers."""
_LISTED = 5


def computed_in_float(path: Path, runtime: str) -> list[str]:
    """Names of the layers with integer weights that `runtime` computes in float, in the order of the file."""
    layers = [each.name for each in file_layers(path) if each.bits <= MOST_BITS]
    if not layers:
        return []
    names = {name: name for name in layers}
    nodes = _onnxruntime(path) if runtime == "onnxruntime" else _openvino(path)
    found = {layer_of_node(node, names) for node in nodes}
    return [name for name in layers if name in found]


def unlisted_warning(path: Path, runtime: str, model: nn.Module, example: NetworkInput) -> str | None:
    """A warning about layers in float that `integer_coverage` counts as integer; None without any.

    Args:
        path: the exported file.
        runtime: the runtime that `model` was quantized for.
        model: the quantized network.
        example: images (N, C, H, W).
    """
    in_float = computed_in_float(path, runtime)
    if not in_float:
        return None
    operators = integer_coverage(model, example).operators
    listed = {each.name for each in operators}
    owners = {each.name for each in operators if each.name and each.kind not in _OF_ACTIVATIONS}
    unlisted = [name for name in in_float if name not in listed and name.rpartition(".")[0] not in owners]
    if not unlisted:
        return None
    more = f" and {len(unlisted) - _LISTED} more" if len(unlisted) > _LISTED else ""
    return (
        f"{runtime} computes these layers in float, although their weights are stored as integers: "
        f"{', '.join(unlisted[:_LISTED])}{more}. They are not faster than in the original."
    )


def _onnxruntime(path: Path) -> Iterator[str]:
    """The names of the products in float in the optimized graph."""
    import onnx  # here, because it is slow to import

    ort = load_runtime("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime_options(ort, default_threads())
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    yield from (node.name for node in graph.node if node.op_type in _FLOAT_PRODUCTS)


def _openvino(path: Path) -> Iterator[str]:
    ov = load_runtime("openvino")
    compiled: Any = openvino_compiled(ov, str(path), openvino_config(None, default_threads()))
    for operator in compiled.get_runtime_model().get_ops():
        info = operator.get_rt_info()
        if info["layerType"] in _OPENVINO_PRODUCTS and info["runtimePrecision"] in _FLOAT_PRECISIONS:
            yield operator.get_friendly_name()
