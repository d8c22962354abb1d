"""What methods have laid on a network, as plain values: cuts, grids on edges, masks and grids on weights,
and which BatchNorms can be frozen.

`rebuild(fresh, structure(model))` has the shapes and keys of `model`, where `fresh` is a new network of its class; the
`state_dict` brings the values. No data is needed, no number is drawn, nothing is executed.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from tersor.core.affine import Grid
from tersor.core.errors import InputError
from tersor.core.freezing import Freezable, Norm, freezable
from tersor.core.learned_step import LearnedFakeQuantize
from tersor.core.parametrization import (
    FakeQuantize,
    FollowingFakeQuantize,
    Mask,
    MovingFakeQuantize,
    RunningLargest,
    shown_by,
)
from tersor.core.selection import weighted_layers
from tersor.graph.capture import capture, layer_of
from tersor.graph.channels import Cut, remove
from tersor.graph.placement import show


def structure(model: nn.Module) -> dict[str, Any]:
    """Plain values, which JSON keeps.

    Raises:
        InputError: a weight lies under a parametrization that is not ours.
    """
    edges: list[list[Any]] = []
    if isinstance(model, fx.GraphModule):
        for node in model.graph.nodes:
            module = layer_of(node)
            if isinstance(module, FakeQuantize):
                edges.append([node.all_input_nodes[0].name, str(node.target), _told(module)])
    layers = {name: [_told(each) for each in shown_by(layer)] for name, layer in weighted_layers(model).items()}
    return {
        "captured": isinstance(model, fx.GraphModule),
        "cuts": list(model.meta.get("cuts", [])) if isinstance(model, fx.GraphModule) else [],
        "freezable": [name for name, module in model.named_modules() if isinstance(module, Freezable)],
        "edges": edges,
        "weights": {name: told for name, told in layers.items() if told},
    }


def rebuild(fresh: nn.Module, found: dict[str, Any]) -> nn.Module:
    """A network of the shapes and keys that `structure` told.

    Args:
        fresh: a new network of the same class, which is changed.
        found: what `structure` gave.
    """
    model = capture(fresh) if found["captured"] else fresh
    if isinstance(model, fx.GraphModule):
        for cuts in found["cuts"]:
            remove(model, [Cut(layer, axis, tuple(places)) for layer, axis, places in cuts])
        _lay_edges(model, found["edges"])
    for name in found["freezable"]:
        norm = model.get_submodule(name)
        assert isinstance(norm, Norm)
        model.set_submodule(name, freezable(norm))
    for name, told in found["weights"].items():
        layer = model.get_submodule(name)
        for each in told:
            parametrize.register_parametrization(layer, "weight", _made(each))
    return model


def _lay_edges(graph: fx.GraphModule, edges: list[list[Any]]) -> None:
    if edges:
        graph.add_submodule("quantizers", nn.Module())
    for value, target, told in edges:
        moved = hasattr(graph.get_submodule("quantizers"), target.removeprefix("quantizers."))
        if not moved:
            graph.add_submodule(target, _made(told))
        show(graph, next(node for node in graph.graph.nodes if node.name == value), target, moved=moved)
    graph.recompile()


def _told(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, Mask):
        return {"mask": list(module.mask.shape), "gradient": module.gradient, "logged": module.log is not None}
    if isinstance(module, RunningLargest):
        return {"largest": len(module.largest) if module.largest.ndim else None}
    if isinstance(module, MovingFakeQuantize):
        return {"grid": [module.grid.minimum, module.grid.maximum], "averaging": module.averaging}
    if isinstance(module, FakeQuantize):
        channels = len(module.scale) if module.scale.ndim else None
        told: dict[str, Any] = {"grid": [module.grid.minimum, module.grid.maximum], "channels": channels}
        if isinstance(module, FollowingFakeQuantize):
            told["follows"] = True
        if isinstance(module, LearnedFakeQuantize):
            told |= {"offset": module.offset is not None, "of_images": module.of_images}
        return told
    raise InputError(f"a weight lies under a {type(module).__name__}, which no checkpoint of tersor can hold.")


def _made(told: dict[str, Any]) -> nn.Module:
    if "mask" in told:
        return Mask(told["mask"], told["gradient"], logged=told["logged"])
    if "largest" in told:
        return RunningLargest(told["largest"])
    grid = Grid(*told["grid"])
    if "averaging" in told:
        return MovingFakeQuantize(grid, told["averaging"])
    if "follows" in told:
        return FollowingFakeQuantize(grid, told["channels"])
    if "offset" in told:
        return LearnedFakeQuantize(grid, told["channels"], offset=told["offset"], of_images=told["of_images"])
    return FakeQuantize(grid, told["channels"])
