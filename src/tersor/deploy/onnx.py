"""ONNX export: one file with Q/DQ pairs and integer weights.

Fake quantizers do not export with a dynamic batch, and would store float32 weights before a QuantizeLinear. So the
graph is rebuilt first (`integer_graph.py`): activation quantizers become QuantizeLinear + DequantizeLinear. A quantized
layer gets an int8 weight, followed by a DequantizeLinear, and an int32 bias at the scale of the products, as integer
kernels need. BatchNorm is folded into scale and bias. `torch.onnx.export` then converts the graph; metadata that names
this machine (stack traces with paths) is removed.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import onnx
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tersor.core.errors import CompressionWarning, InputError
from tersor.core.files import write_file
from tersor.data.network_inputs import NetworkInput
from tersor.deploy.circular_padding import write_as_slices
from tersor.deploy.int4_packing import pack_int4
from tersor.deploy.integer_graph import to_integer_graph
from tersor.deploy.mask_packing import pack_masks
from tersor.deploy.operator_table import one_operator_table
from tersor.deploy.outputs import output_names
from tersor.deploy.weight_transposes import separate_transposes
from tersor.graph.capture import refuse_reserved_names
from tersor.graph.export_program import refusal_reason, without_exporter_output
from tersor.graph.forward_call import dynamic_shapes, input_names
from tersor.graph.parametrization import in_float32, strip
from tersor.graph.plain_modules import is_plain
from tersor.quantization.qdq_placement import RUNTIME

OPSET = 21
_FIRST_IR_VERSION_OF_OPSET_21 = 10
_UNKNOWN = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
_STATIC = (
    "the file has a batch size of 1, because the forward method reshapes across the batch dimension in a way that the "
    "exporter supports only for a fixed batch size. A batch of n images takes n runs. To set another size, "
    "write target.batch in a recipe, or pass batch=... to tersor.export."
)


class MeanPool(nn.Module):
    """Global average pooling as a mean.

    In channels-last networks (Swin) torch's own pooling exports a dozen index operators, with which OpenVINO 2026.4
    adds the first channel's bias to every channel of the first convolution.
    """

    def forward(self, values: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)."""
        return values.mean((-2, -1), keepdim=True)


class PixelInput(nn.Module):
    """A network with its normalization: takes uint8 pixels (N, C, ...) and runs on (pixel / 255 - mean) / std."""

    factor: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], rank: int = 4) -> None:
        super().__init__()
        self.network = network
        by_channel = (1, -1, *[1] * (rank - 2))
        deviation = torch.tensor(std).reshape(by_channel)
        self.register_buffer("factor", 1 / (255 * deviation))
        self.register_buffer("offset", torch.tensor(mean).reshape(by_channel) / deviation)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, ...) uint8 -> outputs of the network."""
        return self.network(pixels.float() * self.factor - self.offset)


def export(
    model: nn.Module,
    example: NetworkInput,
    path: Path | str,
    *,
    classes: Sequence[str] = (),
    pixels: tuple[Sequence[float], Sequence[float]] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    batch: int | None = None,
) -> Path:
    """Export `model` to `path` as one ONNX file; the file is written atomically.

    The runtime that a network was quantized for is stored in the metadata as JSON under `runtime`.

    Args:
        model: any network; one quantized by `ptq` or `qat` becomes an integer network.
        example: normalized images (N, C, H, W) float32 of the size to export for, or several inputs.
        path: file to write, `*.onnx`; an existing one is replaced.
        classes: class names, stored in the file's metadata as JSON under `classes`.
        pixels: mean and standard deviation; the file then takes uint8 pixels (N, C, ...) and normalizes them itself.
        normalization: mean and standard deviation of the images, stored in the metadata as JSON under `normalization`;
            by default `pixels`.
        batch: batch size; dynamic by default.

    Raises:
        InputError: the network cannot be converted, or `path` cannot be written.
    """
    path = Path(path)
    if path.suffix != ".onnx" and not path.is_dir():
        raise InputError(f"cannot write {path}: the name must end in .onnx.")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}.")
    runtime = model.meta.get(RUNTIME) if isinstance(model, fx.GraphModule) else None
    model = in_float32(model)
    network = to_integer_graph(model) if isinstance(model, fx.GraphModule) else strip(model)
    network = network.cpu().float().eval()
    _replace_global_pooling(network)
    inputs = example[:1].cpu().float().contiguous()
    if pixels is not None:
        assert isinstance(inputs, Tensor)
        network = PixelInput(network, *pixels, rank=inputs.ndim).eval()
        inputs = torch.zeros(inputs.shape, dtype=torch.uint8)
    program = _convert(network, inputs, batch)
    if batch is None and _is_static(program.model_proto):  # the exporter fixes a size that the code needs
        program = _convert(network, inputs, 1)
        warnings.warn(_STATIC, CompressionWarning, stacklevel=3)
    proto = program.model_proto
    pack_int4(proto.graph)
    pack_masks(proto.graph)
    separate_transposes(proto.graph)
    write_as_slices(proto.graph)
    _strip_metadata(proto, output_names(program, [each.name for each in proto.graph.input]))
    if classes:
        proto.metadata_props.add(key="classes", value=json.dumps(list(classes)))
    if runtime is not None:
        proto.metadata_props.add(key="runtime", value=json.dumps(runtime))
    if normalization := normalization or pixels:
        mean, std = normalization
        proto.metadata_props.add(key="normalization", value=json.dumps({"mean": list(mean), "std": list(std)}))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the network cannot be converted to ONNX: the exporter wrote an invalid file ({reason}). If this names a "
            "layer or an operator, use another one in the network."
        ) from error
    write_file(path, proto.SerializeToString())
    return path


def _replace_global_pooling(network: nn.Module) -> None:
    for name, module in list(network.named_modules()):
        if name and _is_global_pooling(module):
            network.set_submodule(name, MeanPool())


def _is_global_pooling(module: nn.Module) -> bool:
    return isinstance(module, nn.AdaptiveAvgPool2d) and is_plain(module) and module.output_size in (1, (1, 1), [1, 1])


def _is_static(proto: onnx.ModelProto) -> bool:
    """Whether an input has a fixed batch size."""
    return any(each.type.tensor_type.shape.dim[0].HasField("dim_value") for each in proto.graph.input)


def _convert(network: nn.Module, inputs: NetworkInput, batch: int | None) -> torch.onnx.ONNXProgram:
    """Convert for a batch size; None for a dynamic one."""
    inputs = inputs[torch.zeros(batch or 2, dtype=torch.int64)]
    if not isinstance(network, fx.GraphModule):
        refuse_reserved_names(network)
    names = input_names(network, inputs)
    handled = sys.exception()  # of the caller; it is in the context of every error below
    shapes = dynamic_shapes(network, inputs, torch.export.Dim("batch", min=1)) if batch is None else None
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else (inputs.args, inputs.kwargs)
    try:
        # The exporter decomposes attention into matrix products. A fused kernel returns another memory layout, for
        # which a `reshape` after it would be captured as a view that is invalid after the decomposition.
        with without_exporter_output(), sdpa_kernel(SDPBackend.MATH), one_operator_table():  # the file is checked below
            program = torch.onnx.export(
                network,
                args,
                kwargs=kwargs,
                dynamo=True,
                input_names=list(names),
                dynamic_shapes=shapes,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, TypeError) as error:
        if _interrupted(error, handled):
            raise KeyboardInterrupt from error
        raise InputError(f"the network cannot be converted to ONNX: {_reason(error)}") from error
    assert program is not None
    return program


def _interrupted(error: BaseException, handled: BaseException | None) -> bool:
    """Whether Ctrl-C is among the causes of an exporter's error; `handled` and what is before it are none."""
    known = {id(handled)}
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in known:
            continue
        if isinstance(each, KeyboardInterrupt):
            return True
        known.add(id(each))
        waiting += [each.__cause__, each.__context__]
    return False


def _reason(error: BaseException) -> str:
    """The first line of the original error; the exporter wraps it in advice on how to report bugs."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "data-dependent" in str(error):
        return refusal_reason(error)
    if "Unsupported attribute type" in str(error):
        return (
            "an argument of an operator, such as the groups of a convolution, depends on the batch size. Export with a "
            "fixed one: batch=1 in tersor.export, target.batch: 1 in a recipe."
        )
    if found := _UNKNOWN.search(str(error)):
        return f"ONNX has no operator for {found[1]}. Replace the layer or function that calls it."
    line = (str(error).strip().splitlines() or [repr(error)])[0]
    return (
        f"{line.rstrip('.')}. If this names a layer or an operator, replace it in the network; otherwise export parts "
        "of the network to find it."
    )


def _strip_metadata(proto: onnx.ModelProto, outputs: Sequence[str]) -> None:
    """Remove stack traces, paths and inferred shapes; shorten the names of values.

    Convolutions and matrix products have the path of their module as the node's name, for profiles.
    """
    graph = proto.graph
    proto.producer_name, proto.producer_version, proto.doc_string = "tersor", "", ""
    proto.ir_version = _FIRST_IR_VERSION_OF_OPSET_21  # the exporter may write a later one, which older runtimes refuse
    del proto.metadata_props[:]
    del proto.functions[:]
    del graph.value_info[:]
    del graph.metadata_props[:]
    graph.name, graph.doc_string = "tersor", ""
    short = {value.name: value.name for value in graph.input}
    short |= {value.name: name for value, name in zip(graph.output, outputs, strict=True)}

    def rename(name: str) -> str:
        return short.setdefault(name, f"v{len(short)}") if name else name

    for value in [*graph.input, *graph.output]:
        value.name, value.doc_string = short[value.name], ""
        del value.metadata_props[:]
    for initializer in graph.initializer:
        initializer.name, initializer.doc_string = rename(initializer.name), ""
        del initializer.metadata_props[:]
    paths: Counter[str] = Counter()
    for node in graph.node:
        node.name = _module_path(node) if node.op_type in {"Conv", "Gemm", "MatMul"} else ""
        paths[node.name] += 1
        if node.name and paths[node.name] > 1:  # attention has several products, and names have to be unique
            node.name += f".{paths[node.name]}"
        node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]


def _module_path(node: onnx.NodeProto) -> str:
    """The path of the module that the node was exported from, without `PixelInput`."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = cast("list[str]", json.loads(entry.value.replace("'", '"')))
            paths = [scope for scope in scopes if scope]
            return paths[-2].removeprefix("network.") if len(paths) > 1 else ""
    return ""
