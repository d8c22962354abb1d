"""torch.export records equal networks once per process: most of the time of a capture, and hundreds of tests capture.

What it records depends on the classes of a network, their settings, and the shapes of its tensors, which the key below
holds. A network with any other attribute (a tensor, an object, a hook) is recorded every time, as is every network in
the tests of capture itself. All else that capture does (layers, keys, comparison of outputs) runs every time.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tersor.data.network_inputs import NetworkInput, tensors_of
from tersor.graph import export_program
from tersor.graph.forward_call import specs_of

LARGEST = 2_000_000
"""Parameters of the largest network whose record is kept in memory."""

_record = export_program._exported
_records: dict[Hashable, ExportedProgram] = {}
_USES_OF_CAPTURE = {"test_batchnorm_behind", "test_feature_extraction", "test_fused_inference", "test_matrix_products"}
"""Files of tests/graph/ that test what is done with captured networks, not capture itself."""

_APART = {"training", "_parameters", "_buffers", "_modules"}
_OF_A_GRAPH = {"_graph", "_code", "_tracer_cls", "meta"}
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size, type, type(_record))


class _OtherError(Exception):
    """An attribute is not a plain value."""


def pytest_configure() -> None:
    """Start sharing records. A process started by a test calls this itself."""
    export_program._exported = _recorded_once


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    in_tests_of_capture = item.path.parent.name == "graph" and item.path.stem not in _USES_OF_CAPTURE
    export_program._exported = _record if in_tests_of_capture else _recorded_once


def _recorded_once(network: nn.Module, images: NetworkInput, batch: Any) -> ExportedProgram:
    try:
        key = _key(network, images, batch)
    except _OtherError:
        return _record(network, images, batch)
    known = _records.get(key)
    if known is None:
        known = _record(network, images, batch)
        if not known.constants and is_small(network):
            _copy_the_module(known)
            _records[key] = known
    return known


def _copy_the_module(program: ExportedProgram) -> None:
    """From now on `program.module` copies the graph of one module; torch would build that module again every time."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    if not any(isinstance(each, fx.GraphModule) for each in module.children()):  # capture changes regions in place
        program.module = lambda **_options: fx.GraphModule(module, copy.deepcopy(module.graph))


def _key(network: nn.Module, images: NetworkInput, batch: Any) -> Hashable:
    return str(batch), specs_of(images), *map(_described, tensors_of(images)), *_parts(network)


def described_call(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: str) -> Hashable:
    """Everything that an export of a network depends on, except the values of its tensors."""
    return shapes, *map(_described, args), *kwargs, *map(_described, kwargs.values()), *_parts(network)


def is_small(network: nn.Module) -> bool:
    """Whether the record of a network is kept."""
    return sum(each.numel() for each in network.parameters()) <= LARGEST


def _parts(network: nn.Module) -> list[Hashable]:
    number: dict[int, int] = {}  # equal for modules and tensors that are shared
    parts: list[Hashable] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    for path, module in network.named_modules(remove_duplicate=False):
        parts.append((path, number.setdefault(id(module), len(number)), *_settings(module)))
        for name, tensor in [*vars(module)["_parameters"].items(), *vars(module)["_buffers"].items()]:
            parts.append((name, number.setdefault(id(tensor), len(number)), _described(tensor)))
    return parts


def _settings(module: nn.Module) -> tuple[Hashable, ...]:
    apart = _APART | _OF_A_GRAPH if isinstance(module, fx.GraphModule) else _APART
    values = _plain({key: value for key, value in vars(module).items() if key not in apart})
    if isinstance(module, fx.GraphModule):  # each has its own class
        nodes = [(node.target, str(node.meta.get("nn_module_stack"))) for node in module.graph.nodes]
        return fx.GraphModule, type(module).__name__, str(module.code), values, *nodes
    return type(module), type(module).forward, values


def _described(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, type(tensor))


def _plain(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict):
        return type(value), tuple((_plain(key), _plain(each)) for key, each in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(_plain(each) for each in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_plain(each) for each in value)
    raise _OtherError
