"""Quantizers that a runtime cannot read or computes incorrectly: they are removed from the file.

OpenVINO moves the quantization of activations through the graph. In some networks this fails with an error about
shapes, if the tokens of an image are padded or concatenated, for example (CoaT). In others, the outputs are wrong, if
quantized values are padded in one dimension, for example. Without a few of the quantizers the file is right. Which ones
is found by trial: first those in front of one kind of operator, then all of them. Of these, as many as possible are
kept.

The expected outputs are those of the same file in ONNX Runtime without graph optimizations, which rounds exactly where
the file says.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from torch import Tensor

from tersor.core.errors import CompressionWarning
from tersor.core.files import write_file
from tersor.core.machine import default_threads
from tersor.core.target import Runtime
from tersor.data.network_inputs import NetworkInput
from tersor.evaluation.batch_padding import all_in_batches_of
from tersor.evaluation.file_inputs import Array, FileArrays, by_name
from tersor.evaluation.session import Session, load_runtime, onnxruntime_options, open_session
from tersor.evaluation.verification import (
    FLOAT_TOLERANCES,
    LOOSEST_TOLERANCES,
    WARN_RATIO,
    Normalization,
    differences,
    file_inputs,
)

_IMAGES = 4
_MOST_TRIALS = 40
"""Trials for keeping quantizers: a trial takes seconds in a large network."""


@dataclass(frozen=True)
class _Quantizer:
    """A pair of QuantizeLinear and DequantizeLinear.

    Attributes:
        value: the value that is quantized.
        output: the quantized value.
        reader: type of the first operator that reads it.
    """

    value: str
    output: str
    reader: str


@dataclass(frozen=True)
class _Expected:
    """The outputs that a file should have.

    Attributes:
        inputs: images for the file.
        outputs: its outputs.
        quantization: by how much the quantizers of activations change each of them, relative to its norm.
    """

    inputs: FileArrays
    outputs: Sequence[Tensor]
    quantization: Sequence[float]


def remove_unsupported_quantizers(
    path: Path, runtime: Runtime, images: NetworkInput, pixels: Normalization | None = None
) -> None:
    """Remove the quantizers of activations with which `runtime` cannot read a file, or computes wrong outputs.

    A file stays as it is if the runtime supports it, and also if it supports it no better without quantizers.

    Args:
        path: an ONNX file.
        runtime: the runtime.
        images: normalized images (N, C, H, W), of which a few are used.
        pixels: mean and standard deviation, if the file takes uint8 pixels.

    Warns:
        CompressionWarning: quantizers were removed.
    """
    proto = onnx.load(path)
    quantizers = list(_quantizers(proto.graph))
    if runtime == "onnxruntime" or not quantizers:
        return
    inputs, _ = file_inputs(images[:_IMAGES].cpu().float(), pixels)
    with TemporaryDirectory() as folder:
        removed = _unsupported(path, proto, quantizers, Path(folder) / path.name, runtime, inputs)
    if not removed:
        return
    problem = "computes wrong outputs for" if _is_right(path, runtime, None) else "cannot read"
    write_file(path, _without(proto, removed).SerializeToString())
    readers = ", ".join(dict.fromkeys(each.reader for each in removed))
    warnings.warn(
        f"{runtime} {problem} this network if all activations are quantized. Removed activation quantizers: "
        f"{len(removed)} of {len(quantizers)}, at the inputs of operators of type {readers}. Layers with these inputs "
        "can be computed in float.",
        CompressionWarning,
        stacklevel=3,
    )


def _unsupported(
    path: Path,
    proto: onnx.ModelProto,
    quantizers: Sequence[_Quantizer],
    trial: Path,
    runtime: Runtime,
    inputs: FileArrays,
) -> Sequence[_Quantizer]:
    """The quantizers to remove; none if the file is right, or wrong without any quantizers too.

    Args:
        path: the file.
        proto: the network in it.
        quantizers: its quantizers of activations.
        trial: a file for trials.
        runtime: the runtime.
        inputs: images.
    """
    _written(proto, quantizers, trial)
    expected = _expected(path, trial, inputs) if _complete(proto.graph, quantizers) else None
    if _is_right(path, runtime, expected):
        return []
    readable = _is_right(path, runtime, None)
    wanted = expected if readable or _is_right(trial, runtime, expected) else None
    right = lambda left_out: _is_right(_written(proto, left_out, trial), runtime, wanted)  # noqa: E731
    return _fewest(_of_one_kind(quantizers, right), right) if right(quantizers) else []


def _written(proto: onnx.ModelProto, left_out: Collection[_Quantizer], file: Path) -> Path:
    """The file of a network without some quantizers."""
    file.write_bytes(_without(proto, left_out).SerializeToString())
    return file


def _expected(path: Path, without_quantizers: Path, inputs: FileArrays) -> _Expected | None:
    """The outputs that a file should have; None if ONNX Runtime cannot run it."""
    try:
        outputs, floats = (_as_written(each, inputs) for each in (path, without_quantizers))
    except Exception:  # ONNX Runtime's own exceptions have no common class
        return None
    return _Expected(inputs, outputs, differences(floats, outputs))


def _as_written(path: Path, inputs: FileArrays) -> list[Tensor]:
    """The outputs of a file in ONNX Runtime without graph optimizations."""
    session, ort = open_session(path, "onnxruntime"), load_runtime("onnxruntime")
    options = onnxruntime_options(ort, default_threads())
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    infer_all = lambda arrays: model.run(list(session.outputs), by_name(session.inputs, arrays))  # noqa: E731
    if session.batch is not None:
        infer_all = all_in_batches_of(infer_all, session.batch)
    return _floats(infer_all(inputs))


def _complete(graph: onnx.GraphProto, quantizers: Sequence[_Quantizer]) -> bool:
    """Whether these are all roundings of activations: values that are clipped to fewer bits are not among them."""
    rounded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    return rounded <= {each.value for each in quantizers}


def _is_right(path: Path, runtime: Runtime, expected: _Expected | None) -> bool:
    """Whether a runtime can read a file and computes the expected outputs, if any are given."""
    try:
        session = open_session(path, runtime)
        if expected is None or _agrees(session, expected):
            return True
        return session.precision != "float32" and _agrees(open_session(path, runtime, precision="float32"), expected)
    except Exception:  # the runtimes' own exceptions have no common class
        return False


def _agrees(session: Session, expected: _Expected) -> bool:
    """Whether the outputs differ by no more than rounding usually explains, as in `verification`."""
    tolerance, _ = FLOAT_TOLERANCES.get(session.precision, LOOSEST_TOLERANCES)
    found = differences(_floats(session.run_all(expected.inputs).values()), expected.outputs)
    limits = [max(WARN_RATIO * each, tolerance) for each in expected.quantization]
    return all(difference <= limit for difference, limit in zip(found, limits, strict=True))


def _floats(outputs: Iterable[Array]) -> list[Tensor]:
    return [each.double() for each in map(torch.from_numpy, outputs) if each.is_floating_point()]


def _quantizers(graph: onnx.GraphProto) -> Iterator[_Quantizer]:
    """The quantizers of activations that only operators read."""
    made_by = {output: node for node in graph.node for output in node.output}
    outputs = {each.name for each in graph.output}
    readers: dict[str, str] = {}
    for node in graph.node:
        for each in node.input:
            readers.setdefault(each, node.op_type)
    for node in graph.node:
        quantize = made_by.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantize is not None and quantize.op_type == "QuantizeLinear" and node.output[0] in readers.keys() - outputs:
            yield _Quantizer(quantize.input[0], node.output[0], readers[node.output[0]])


def _without(proto: onnx.ModelProto, quantizers: Collection[_Quantizer]) -> onnx.ModelProto:
    """A copy of a network without these quantizers."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    graph, value_of = copied.graph, {each.output: each.value for each in quantizers}
    for node in graph.node:
        for place, value in enumerate(node.input):
            while value in value_of:
                value = value_of[value]
            node.input[place] = value
    _remove_unread(graph)
    return copied


def _remove_unread(graph: onnx.GraphProto) -> None:
    """Remove the quantizers, and their scales and zero points, that nothing reads."""
    read = {each.name for each in graph.output}
    for node in reversed(list(graph.node)):
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and node.output[0] not in read:
            graph.node.remove(node)
        else:
            read.update(node.input)
    for constant in [each for each in graph.initializer if each.name not in read]:
        graph.initializer.remove(constant)


def _of_one_kind(
    quantizers: Sequence[_Quantizer], right: Callable[[Collection[_Quantizer]], bool]
) -> Sequence[_Quantizer]:
    """Quantizers in front of the rarest kind of operator whose removal is enough; all quantizers if there is none."""
    for reader, _ in reversed(Counter(each.reader for each in quantizers).most_common()):
        chosen = [each for each in quantizers if each.reader == reader]
        if right(chosen):
            return chosen
    return quantizers


def _fewest(removed: Sequence[_Quantizer], right: Callable[[Collection[_Quantizer]], bool]) -> list[_Quantizer]:
    """The quantizers that have to be removed: as many as possible are kept, in halves, quarters and so on."""
    waiting, left = [list(removed)], list(removed)
    for _ in range(_MOST_TRIALS):
        if not waiting:
            break
        part = waiting.pop(0)
        if len(left) > len(part) and right(rest := [each for each in left if each not in part]):
            left = rest
        elif len(part) > 1:
            waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
    return left
