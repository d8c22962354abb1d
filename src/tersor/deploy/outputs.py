"""Output names of an ONNX file, and which output is the logits (needs no torch)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

LOGITS = "logits"
_RESERVED = re.compile(r"images|v\d+")
"""Names of the file's input and inner values."""


def output_names(program: ONNXProgram, inputs: Sequence[str]) -> list[str]:
    """A name for each output: a single one is `logits`, those of a dict have their keys, those of a tuple are
    `output_0`, `output_1`; nested keys and indices are joined by dots. None values are not outputs. An output whose
    name is also in `inputs` gets the prefix `output_`.
    """
    from torch.export.graph_signature import ConstantArgument
    from torch.utils import _pytree as pytree

    exported = program.exported_program
    assert exported is not None
    spec = exported.call_spec.out_spec
    assert spec is not None
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    specs = exported.graph_signature.output_specs[-spec.num_leaves :]
    paths = [path for (path, _), each in zip(leaves, specs, strict=True) if not isinstance(each.arg, ConstantArgument)]
    if len(paths) == 1:
        named = any(isinstance(each, pytree.MappingKey) for each in paths[0])
        return [_other_than(inputs, _name(paths[0]) if named else LOGITS)]
    return _unique([_other_than(inputs, _name(path)) for path in paths])


def _name(path: Sequence[Any]) -> str:
    parts = [str(getattr(each, "key", getattr(each, "idx", getattr(each, "name", each)))) for each in path]
    name = ".".join(parts)
    return f"output_{name}" if parts[0].isdecimal() or _RESERVED.fullmatch(name) else name


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(names)]


def _other_than(inputs: Sequence[str], name: str) -> str:
    while name in inputs:
        name = f"output_{name}"
    return name


def logits_index(names: Sequence[str], ranks: Sequence[int | None]) -> int | None:
    """Index of the logits: the output of that name, a single output, or the only one of shape (N, classes); else None.

    Args:
        names: names of the outputs, in their order.
        ranks: number of dimensions of each; None where the file has none.
    """
    if LOGITS in names:
        return names.index(LOGITS)
    if len(names) == 1:
        return 0
    flat = [place for place, rank in enumerate(ranks) if rank == 2]
    return flat[0] if len(flat) == 1 and None not in ranks else None
