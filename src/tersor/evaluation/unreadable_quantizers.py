"""Quantizers that keep a runtime from reading a file: they are removed from the file.

OpenVINO moves the quantization of activations through the graph. In some networks this fails with an error about
shapes: if the tokens of an image are padded or concatenated, for example (CoaT). Without a few of the quantizers it
succeeds. Which ones is found by trial: first those in front of one kind of operator, then all of them. Of these, as
many as possible are kept.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from tersor.core.errors import CompressionWarning, InputError
from tersor.core.files import write_file
from tersor.core.target import Runtime
from tersor.evaluation.session import open_session

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


def remove_unreadable_quantizers(path: Path, runtime: Runtime) -> None:
    """Remove the quantizers of activations that keep `runtime` from reading a file; a warning is issued.

    A file that the runtime can read stays as it is, and so does one that it cannot read without quantizers either.

    Args:
        path: an ONNX file.
        runtime: the runtime.
    """
    reason = _reason(path, runtime)
    if reason is None:
        return
    proto = onnx.load(path)
    quantizers = list(_quantizers(proto.graph))
    with TemporaryDirectory() as folder:
        readable = partial(_readable_without, proto, Path(folder) / path.name, runtime)
        if not quantizers or not readable(quantizers):
            return
        removed = _fewest(_of_one_kind(quantizers, readable), readable)
    write_file(path, _without(proto, removed).SerializeToString())
    readers = ", ".join(dict.fromkeys(each.reader for each in removed))
    warnings.warn(
        f"{runtime} cannot read this network with all of its {len(quantizers)} quantizers of activations. The file "
        f"leaves out {len(removed)} of them (in front of {readers}). A further warning names the layers that are "
        "computed in float because of this, if there are any.",
        CompressionWarning,
        stacklevel=3,
    )


def _reason(path: Path, runtime: Runtime) -> str | None:
    """Why the runtime cannot read a file; None if it can."""
    try:
        open_session(path, runtime)
    except InputError as error:
        return str(error)
    return None


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


def _readable_without(proto: onnx.ModelProto, file: Path, runtime: Runtime, quantizers: Collection[_Quantizer]) -> bool:
    """Whether the runtime can read a network without these quantizers."""
    file.write_bytes(_without(proto, quantizers).SerializeToString())
    return _reason(file, runtime) is None


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
    quantizers: Sequence[_Quantizer], readable: Callable[[Collection[_Quantizer]], bool]
) -> Sequence[_Quantizer]:
    """Quantizers in front of the rarest kind of operator whose removal is enough; all quantizers if there is none."""
    for reader, _ in reversed(Counter(each.reader for each in quantizers).most_common()):
        chosen = [each for each in quantizers if each.reader == reader]
        if readable(chosen):
            return chosen
    return quantizers


def _fewest(removed: Sequence[_Quantizer], readable: Callable[[Collection[_Quantizer]], bool]) -> list[_Quantizer]:
    """The quantizers that have to be removed: as many as possible are kept, in halves, quarters and so on."""
    waiting, left = [list(removed)], list(removed)
    for _ in range(_MOST_TRIALS):
        if not waiting:
            break
        part = waiting.pop(0)
        if len(left) > len(part) and readable(rest := [each for each in left if each not in part]):
            left = rest
        elif len(part) > 1:
            waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
    return left
