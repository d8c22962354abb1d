"""torch.onnx.export decomposes equal programs once per process: most of the time of an export of a small network.

The decomposed graph depends on the graph and on the shapes of its tensors, which the key below holds, and not on the
values of weights. A program with a tensor that the forward method creates is decomposed every time. All else that an
export does (torch.export, translation, optimization, checks) runs every time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._export import utils as _export_utils
from torch._subclasses import fake_impls
from torch.export import ExportedProgram, exported_program
from torch.onnx._internal.exporter import _decomp, _fx_passes

_decompose = _fx_passes.decompose_with_registry
_table_of = _decomp.create_onnx_friendly_decomposition_table
_override = exported_program._override_composite_implicit_decomp
_decomposed: dict[tuple[str, ...], ExportedProgram] = {}
_overrides: list[tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]] = []
"""Operators with their decompositions; their kernels and rules for fake tensors before and after."""


def pytest_configure() -> None:
    """Start sharing decompositions. A process started by a test calls this itself."""
    # registers the C++ operators in torch.ops, 60 times for every ONNX file; no test adds an operator
    _export_utils._materialize_cpp_cia_ops = functools.cache(_export_utils._materialize_cpp_cia_ops)
    exported_program._collect_all_valid_cia_ops = functools.cache(exported_program._collect_all_valid_cia_ops)
    _decomp.create_onnx_friendly_decomposition_table = _table
    exported_program._override_composite_implicit_decomp = _overridden_again
    _fx_passes.decompose_with_registry = _decomposed_once


def _table(operators: set[Any]) -> dict[Any, Callable[..., Any]]:
    return _cached_table(frozenset(operators), len(decomposition_table))  # modules that are imported later add to it


@functools.cache
def _cached_table(operators: frozenset[Any], _size: int) -> dict[Any, Callable[..., Any]]:
    return _table_of(set(operators))


def _decomposed_once(program: ExportedProgram, registry: Any) -> ExportedProgram:
    key = _key(program)
    known = _decomposed.get(key)
    if known is None:
        known = _decompose(program, registry)
        if not _depends_on_the_graph_alone(program, known):
            return known
        _decomposed[key] = known
    graph = copied_graph(known)
    return ExportedProgram(
        root=graph,
        graph=graph.graph,
        graph_signature=known.graph_signature,
        state_dict=program.state_dict,
        range_constraints=known.range_constraints,
        module_call_graph=known.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )


def copied_graph(program: ExportedProgram) -> fx.GraphModule:
    """A copy of the graph of a program, since the exporter changes it."""
    graph = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    for node, copied in zip(program.graph.nodes, graph.graph.nodes, strict=True):
        copied.name = node.name  # a copy avoids names of Python's functions, such as input
    return graph


def _depends_on_the_graph_alone(program: ExportedProgram, decomposed: ExportedProgram) -> bool:
    pairs = [(program.state_dict, decomposed.state_dict), (program.constants, decomposed.constants)]
    same = all(len(old) == len(new) and all(old[key] is new.get(key) for key in old) for old, new in pairs)
    plain = not any(isinstance(each, fx.GraphModule) for each in program.graph_module.children())
    return same and plain and not program.graph_signature.inputs_to_lifted_tensor_constants


def _key(program: ExportedProgram) -> tuple[str, ...]:
    nodes = [f"{_described(node.meta.get('val'))} {node.meta.get('nn_module_stack')}" for node in program.graph.nodes]
    whole = program.graph, program.graph_signature, program.range_constraints, program.call_spec
    return *map(str, whole), *nodes


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.shape} {value.stride()} {value.dtype} {value.device} {value.requires_grad}"
    return f"{[*map(_described, value)]}" if isinstance(value, tuple | list) else str(value)


@contextmanager
def _overridden_again(operators: dict[Any, Callable[..., Any]]) -> Generator[None]:
    """torch replaces the kernels of 500 operators one by one; from the second time on, all are put in place at once."""
    before = _kernels_and_rules(operators)
    after = next((after for known, then, after in _overrides if known == operators and then == before), None)
    if after is None:
        with _override(operators):
            _overrides.append((dict(operators), before, _kernels_and_rules(operators)))
            yield
        return
    for operator, (kernels, rule) in after.items():
        _put(operator, kernels)
        if rule is not None and before[operator][1] is None:
            fake_impls.register_op_impl(operator)(rule)
    try:
        yield
    finally:
        for operator, (kernels, _) in before.items():
            _put(operator, kernels)
            fake_impls._deregister_op_impl(operator)


def _kernels_and_rules(operators: Iterable[Any]) -> dict[Any, tuple[dict[Any, Any], Any]]:
    rules = fake_impls.op_implementations_dict
    return {each: (dict(each.py_kernels), rules.get(each)) for each in operators}


def _put(operator: Any, kernels: dict[Any, Any]) -> None:
    operator.py_kernels.clear()
    operator.py_kernels.update(kernels)
    operator._dispatch_cache.clear()
