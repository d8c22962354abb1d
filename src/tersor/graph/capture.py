"""Capture: a network -> its graph, which trains, loads and saves like the network, over the same Parameter objects.

torch.export runs the network once in eval mode and records aten operators, with a dynamic batch size
(`export_program`). An operation is the same aten operator however it is written in Python. Then layers take the place
of operators with weights (`layer_restoration`). What a network does in training mode alone is lost: stochastic depth,
auxiliary heads.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from keyword import iskeyword
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import CompressionWarning, InputError
from tersor.data.network_inputs import NetworkInput
from tersor.graph.aten import DTYPE, SHAPE
from tersor.graph.comparison import outputs_of, require_same
from tersor.graph.custom_gradients import lost_gradients
from tersor.graph.eval_mode import checked_forward
from tersor.graph.export_program import exported
from tersor.graph.fingerprint import FINGERPRINT, fingerprint
from tersor.graph.forward_call import InputSpec, specs_of, zeros
from tersor.graph.layer_restoration import calls_of, restore_layers
from tersor.graph.modes import LOST, RANDOM, computed_in_forward, lost_in_training, random_numbers
from tersor.graph.original_keys import keep_keys
from tersor.graph.parametrization import strip
from tersor.graph.plain_modules import is_hooked

INPUTS = "inputs"
"""Key in a captured network's `meta`: the `InputSpec` of each input."""

_NAMES_OF_A_GRAPH = {*dir(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}
_IS_SIZE = "is_size"


def capture(model: nn.Module, images: NetworkInput) -> fx.GraphModule:
    """Capture the graph of `model` as a module that trains, loads and saves like it.

    `meta["layers"]` maps the path of every called module to the node of its output.

    Args:
        model: the network; a captured one is returned unchanged.
        images: some images (N, C, H, W), or several input tensors; the graph accepts any number of images of this size.

    A `CompressionWarning` is issued if the network draws random numbers in eval mode.

    Raises:
        InputError: the network does not run on the images, its forward method depends on their values, or the captured
            graph computes something else.
    """
    if is_captured(model):
        return model
    _require_own_forward(model)
    device = next((each.device for each in model.parameters()), images.device)
    images = (images[:2] if len(images) > 1 else images[[0, 0]]).contiguous().to(device)
    several = [images[[0, 1, 0]], images[:1]]  # other numbers than the exporter sees
    with checked_forward(type(model).__name__, images):
        expected = [outputs_of(strip(model), each) for each in several]  # a copy: `forward` may store what it computes
    captured = _recorded(model, images)
    with checked_forward(type(model).__name__, images, captured=True):
        for each, outputs in zip(several, expected, strict=True):
            require_same(captured, outputs, each)
    captured.meta[LOST] += lost_gradients(model, captured, images)
    if (place := captured.meta[RANDOM]) is not None:
        warnings.warn(
            f"the forward method of {type(model).__name__} draws random numbers in eval mode{place}: its outputs "
            "differ from run to run, before and after compression.",
            CompressionWarning,
            stacklevel=2,
        )
    return captured


def is_captured(model: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether this is the result of `capture`, and not a graph that the user has traced."""
    return isinstance(model, fx.GraphModule) and INPUTS in model.meta


def capture_again(model: nn.Module, inputs: Sequence[InputSpec]) -> fx.GraphModule:
    """Capture a new network of the class of one that was captured before, without running it.

    Args:
        model: the network.
        inputs: what it was captured on.
    """
    device = next((each.device for each in model.parameters()), None)
    return _recorded(model, zeros(inputs, 2, device))


def _recorded(model: nn.Module, images: NetworkInput) -> fx.GraphModule:
    graph = exported(model, images)
    modules = restore_layers(graph, model)
    captured = _assembled(model, graph, modules)
    captured.meta[INPUTS] = specs_of(images)
    captured.meta["layers"] = _layer_outputs(captured)
    captured.meta[FINGERPRINT] = fingerprint(captured)
    captured.meta[LOST] = [*lost_in_training(model, graph.graph), *computed_in_forward(model, captured)]
    captured.meta[RANDOM] = random_numbers(graph.graph)
    _keep_shapes(captured)
    return captured


def refuse_reserved_names(model: nn.Module) -> None:
    """Check that no submodule, parameter or buffer has a name that the code of a `torch.fx.GraphModule` cannot have.

    Raises:
        InputError: one has.
    """
    if taken := sorted(_own_names(model) & _NAMES_OF_A_GRAPH):
        raise InputError(
            f"{type(model).__name__} has an attribute named '{taken[0]}', which is reserved in a captured graph. "
            f"Rename it, for example to '{taken[0]}_'."
        )
    if keywords := [path for path, _ in model.named_modules() if any(map(iskeyword, path.split(".")))]:
        raise InputError(
            f"the graph of {type(model).__name__} cannot be captured: the name of the submodule {keywords[0]} is a "
            "Python keyword. Rename that submodule."
        )


def _own_names(model: nn.Module) -> set[str]:
    return {name for part in ("_modules", "_parameters", "_buffers") for name in vars(model)[part]}


def _require_own_forward(model: nn.Module) -> None:
    """Check that the graph can hold everything that the forward method of the outermost module does.

    Raises:
        InputError: a forward method set on the instance, hooks on the outermost module, or a part with a reserved name.
    """
    if "forward" in vars(model) or is_hooked(model):
        raise InputError(
            f"the graph of {type(model).__name__} cannot be captured: a forward method was set on the instance, or "
            "forward hooks are registered on it, and the graph would lose them. Define the forward method in a class; "
            "remove the hooks."
        )
    refuse_reserved_names(model)
    if "self" in _own_names(model):
        kind = type(model).__name__
        raise InputError(f"{kind} has a submodule named 'self', which a captured graph cannot call. Rename it.")
    if scripts := [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]:
        raise InputError(
            f"the graph of {type(model).__name__} cannot be captured: {scripts[0]} is a TorchScript program. Replace "
            "it with the torch.nn.Module that it was made from."
        )


def _assembled(model: nn.Module, recorded: fx.GraphModule, modules: dict[str, nn.Module]) -> fx.GraphModule:
    """A GraphModule over `modules`, and over the parameters and buffers of `model` that the graph reads."""
    captured = fx.GraphModule(nn.Module(), fx.Graph(), class_name=type(model).__name__)
    originals = dict(model.named_modules(remove_duplicate=False))
    order = {path: place for place, path in enumerate(originals)}  # parents first
    tensors = [str(node.target) for node in recorded.graph.find_nodes(op="get_attr")]
    for path in sorted([*modules, *tensors], key=lambda path: order.get(path, order.get(path.rpartition(".")[0], -1))):
        if path in modules:
            _container(captured, path).add_module(path.rpartition(".")[2], modules[path])
        else:
            _place_tensor(captured, model, recorded, path)
    for path, module in captured.named_modules():
        if path not in modules:
            module.training = originals.get(path, model).training
    captured.graph = recorded.graph
    keep_keys(captured, model)
    return captured


def _container(root: nn.Module, path: str) -> nn.Module:
    """The module that holds `path`, made where there is none."""
    for name in path.split(".")[:-1]:
        parts = root._modules  # pyright: ignore[reportPrivateUsage]  # named_children() has a shared part once
        if name not in parts:
            root.add_module(name, nn.Module())
        root = cast("nn.Module", parts[name])
    return root


def _place_tensor(captured: fx.GraphModule, model: nn.Module, recorded: fx.GraphModule, path: str) -> None:
    """Register what a `get_attr` node reads: a Parameter, a buffer, a constant (which is not saved), a subgraph."""
    owner, name = _container(captured, path), path.rpartition(".")[2]
    if hasattr(owner, name):
        return
    try:
        source = model.get_submodule(path.rpartition(".")[0])
        value = getattr(source, name)
    except AttributeError:  # a tensor that the forward method creates
        source, value = recorded, operator.attrgetter(path)(recorded)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    elif isinstance(value, Tensor):
        saved = source is not recorded and name in source.state_dict()
        owner.register_buffer(name, value.detach() if source is recorded else value, persistent=saved)
    else:
        setattr(owner, name, value)


def _layer_outputs(captured: fx.GraphModule) -> dict[str, str]:
    """Path of a module -> name of the node of its output: the only value of its last call that others read."""
    nodes: defaultdict[str, dict[str, list[fx.Node]]] = defaultdict(dict)
    for node in captured.graph.nodes:
        for key, path in calls_of(node):
            if path and node.op != "get_attr":
                nodes[path].setdefault(key, []).append(node)
    found: dict[str, str] = {}
    for path, calls in nodes.items():
        inside = set(calls[list(calls)[-1]])
        outputs = [node for node in inside if any(user not in inside for user in node.users)]
        if len(outputs) == 1:
            found[path] = outputs[0].name
    return found


def _keep_shapes(captured: fx.GraphModule) -> None:
    """Keep of every node the shape (a word for a dimension that depends on the batch) and the module it is in."""
    for node in captured.graph.nodes:
        value, stack = node.meta.get("val"), node.meta.get("nn_module_stack")
        node.meta = {} if stack is None else {"nn_module_stack": stack}
        if isinstance(value, Tensor):
            node.meta[SHAPE] = tuple(size if type(size) is int else str(size) for size in value.shape)
            node.meta[DTYPE] = value.dtype
        elif isinstance(value, torch.SymInt):
            node.meta[_IS_SIZE] = True


def rank_of(node: fx.Node) -> int | None:
    """The number of dimensions of a node's output when the network was captured; None for an inserted node."""
    shape = node.meta.get(SHAPE)
    return None if shape is None else len(shape)


def is_size(node: fx.Node) -> bool:
    """Whether the output of a node is a number: the batch size, or what is computed from it."""
    return _IS_SIZE in node.meta


def has_batch_dimension(node: fx.Node) -> bool:
    """Whether dimension 0 of the output of a node is the batch, and not windows or heads of several images."""
    inputs = next(each for each in node.graph.nodes if each.op == "placeholder")
    return node.meta.get(SHAPE, ())[:1] == inputs.meta.get(SHAPE, ("",))[:1]


def layer_of(node: fx.Node) -> nn.Module | None:
    """The module that a `call_module` node calls, or None for any other node."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(cast("str", node.target))


def values_into(node: fx.Node) -> list[fx.Node]:
    """The inputs of `node` that are tensors or containers of tensors, without numbers."""
    return [value for value in node.all_input_nodes if not is_size(value)]


def parameter_reads(graph: fx.GraphModule) -> Counter[int]:
    """The number of nodes that read each Parameter, by its id: layers may be called twice, or share a weight."""
    found: Counter[int] = Counter()
    for node in graph.graph.nodes:
        module = layer_of(node)
        if module is not None:
            found.update(map(id, module.parameters()))
        elif node.op == "get_attr":
            value: Any = operator.attrgetter(node.target)(graph)
            found[id(value)] += 1
    return found


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only node that reads `node`; None if there is none, or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
