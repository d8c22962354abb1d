"""torch.onnx.export captures equal networks once per process, with the weights of each.

As in `recorded_once`, the key holds the classes of a network, their settings, and the shapes of its tensors; for a
graph its operators and their arguments. A network with any other attribute is captured every time.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.export._trace import _get_original_state_dict as state_dict_of
from torch.onnx._internal.exporter._capture_strategies import TorchExportNonStrictStrategy as Strategy

import recorded_once
from decomposed_once import copied_graph

_capture = Strategy._capture
_captured: dict[Hashable, ExportedProgram] = {}


def pytest_configure() -> None:
    """Start sharing captures. A process started by a test calls this itself."""
    Strategy._capture = _captured_once


def _captured_once(strategy: Any, model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    try:
        key = recorded_once.described_call(model, args, kwargs, str(dynamic_shapes))
    except recorded_once._OtherError:
        return _capture(strategy, model, args, kwargs, dynamic_shapes)
    known = _captured.get(key)
    if known is None:
        known = _capture(strategy, model, args, kwargs, dynamic_shapes)
        if _has_only_tensors_of(known, model) and recorded_once.is_small(model):
            _captured[key] = known
        return known
    graph = copied_graph(known)
    return ExportedProgram(
        root=graph,
        graph=graph.graph,
        graph_signature=known.graph_signature,
        state_dict=state_dict_of(model),
        range_constraints=known.range_constraints,
        module_call_graph=known.module_call_graph,
        example_inputs=(args, kwargs),
        constants=_constants(known, model),
        verifiers=known.verifiers,
    )


def _constants(program: ExportedProgram, model: nn.Module) -> dict[str, Any]:
    return {name: operator.attrgetter(name)(model) for name in program.constants}


def _has_only_tensors_of(program: ExportedProgram, model: nn.Module) -> bool:
    if program.graph_signature.inputs_to_lifted_tensor_constants:
        return False
    if any(isinstance(each, fx.GraphModule) for each in program.graph_module.children()):
        return False
    pairs = (program.state_dict, state_dict_of(model)), (program.constants, _constants(program, model))
    return all([*ours] == [*theirs] and all(ours[name] is theirs[name] for name in ours) for ours, theirs in pairs)
