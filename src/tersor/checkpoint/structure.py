"""The structure of a compressed network as JSON values: removed channels, masks, quantizers, frozen BatchNorm.

`rebuild(fresh, structure(model))` has the shapes and keys of `model`, where `fresh` is a new network of the same class;
the values come from a `state_dict`. Rebuilding needs no data and no random numbers and executes no code. A structure
may come from an untrusted file, so its schema is checked first, and its sizes against the network.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeAlias, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import fx, nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.core.target import Runtime
from tersor.graph.batchnorm import Freezable, Norm, freezable
from tersor.graph.capture import INPUTS, capture_again, is_captured, layer_of
from tersor.graph.eval_mode import evaluating
from tersor.graph.fingerprint import FINGERPRINT
from tersor.graph.forward_call import InputSpec, run, zeros
from tersor.graph.layer_selection import weighted_layers
from tersor.graph.matrix_products import write_as_matrix_products
from tersor.graph.parametrization import parametrizations_of
from tersor.pruning.channel_groups import Cut, remove
from tersor.pruning.mask import Mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.qdq_placement import RUNTIME, read_through
from tersor.quantization.range_tracking import MovingAverage, RunningLargest, WeightShare
from tersor.quantization.runtime_defects import rewrite_for_openvino

_STRANGE = (AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)
"""What graphs and modules raise for the structure of another network."""

_LARGEST_IMAGE = 2**22
_KEPT = (RUNTIME, "normalization")
"""Keys of the `meta` of a quantized graph that are saved: export writes their values into the metadata of the file."""

_Place = Annotated[int, Field(ge=0, lt=2**31)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Bound = Annotated[int, Field(ge=-(2**31), lt=2**31)]
# names become code when a graph is recompiled, so only identifiers are allowed
_Quantizer = Annotated[str, Field(pattern=r"^quantizers\.[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
_Axis = Annotated[
    str,
    Field(
        pattern=r"^(out|in|[0-9]{1,2}|gives=[01]|sections=[0-9]{1,9}(,[0-9]{1,9})*|scale=[0-9]{1,9}"
        r"|(args|kwargs)(\.[A-Za-z0-9_]+)+=[0-9]{1,9})$",
        max_length=2000,
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Mask(_Strict):
    mask: Annotated[list[_Size], Field(min_length=1, max_length=8)]
    gradient: Literal["masked", "straight_through", "split"]

    def made(self) -> nn.Module:
        return Mask(self.mask, self.gradient)


class _Largest(_Strict):
    largest: _Size | None

    def made(self) -> nn.Module:
        return RunningLargest(self.largest)


class _LearnedStep(_Strict):
    offset: bool
    of_images: bool


class _OnGrid(_Strict):
    grid: Annotated[list[_Bound], Field(min_length=2, max_length=2)]
    channels: _Size | None
    averaging: Annotated[float, Field(ge=0, le=1)] | None
    tracks_weight: bool
    learned_step: _LearnedStep | None

    @model_validator(mode="after")
    def _in_order(self) -> _OnGrid:
        if self.grid[0] >= self.grid[1]:
            raise ValueError(f"the grid starts at {self.grid[0]} but ends at {self.grid[1]}")
        if (self.averaging is not None) + self.tracks_weight + (self.learned_step is not None) > 1:
            raise ValueError("a grid may have only one of averaging, tracks_weight and learned_step")
        return self

    def made(self) -> nn.Module:
        quantizer = FakeQuantize(Grid(*self.grid), self.channels)
        if self.averaging is not None:
            quantizer.track_activations(self.averaging)
        if self.tracks_weight:
            quantizer.track_weight()
        if (step := self.learned_step) is not None:
            quantizer.learn_step(offset=step.offset, of_images=step.of_images)
        return quantizer


_Parametrization: TypeAlias = _Mask | _Largest | _OnGrid


_Channels: TypeAlias = Annotated[tuple[float, ...], Field(min_length=1, max_length=64)]


class _Input(_Strict):
    name: str | None
    shape: Annotated[list[_Size], Field(max_length=8)]
    dtype: Literal["float32", "int64", "int32", "uint8", "bool"]


class _Plan(_Strict):
    """The JSON schema of `structure`."""

    inputs: Annotated[list[_Input], Field(min_length=1, max_length=32)] | None
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None
    cuts: list[list[tuple[str, _Axis, list[_Place]]]]
    freezable: list[str]
    edges: list[tuple[str, _Quantizer, _Parametrization]]
    weights: dict[str, Annotated[list[_Parametrization], Field(max_length=8)]]
    runtime: Runtime | None = None
    normalization: tuple[_Channels, _Channels] | None = None

    @model_validator(mode="after")
    def _on_a_graph(self) -> _Plan:
        if self.inputs is None and (self.cuts or self.edges):
            raise ValueError("removed channels and quantized activations need a captured network")
        if sum(math.prod(each.shape) for each in self.inputs or ()) > _LARGEST_IMAGE:
            raise ValueError("the input shapes are too large")
        return self


def structure(model: nn.Module) -> dict[str, Any]:
    """The structure of a network as JSON values.

    Raises:
        InputError: a weight has a parametrization that is not tersor's.
    """
    edges: list[list[Any]] = []
    if is_captured(model):
        for node in model.graph.nodes:
            module = layer_of(node)
            if isinstance(module, FakeQuantize):
                edges.append([node.all_input_nodes[0].name, str(node.target), _described(module)])
    layers = {
        name: [_described(each) for each in parametrizations_of(layer)]
        for name, layer in weighted_layers(model).items()
    }
    return {
        "inputs": [{**asdict(each), "shape": list(each.shape)} for each in model.meta[INPUTS]]
        if is_captured(model)
        else None,
        "fingerprint": model.meta[FINGERPRINT] if is_captured(model) else None,
        "cuts": list(model.meta.get("cuts", [])) if is_captured(model) else [],
        "freezable": [name for name, module in model.named_modules() if isinstance(module, Freezable)],
        "edges": edges,
        "weights": {name: each for name, each in layers.items() if each},
        **{key: model.meta.get(key) if is_captured(model) else None for key in _KEPT},
    }


def rebuild(fresh: nn.Module, found: Any) -> nn.Module:
    """Apply a structure to a new network.

    Args:
        fresh: a new network of the same class; it is changed.
        found: the result of `structure`, possibly read from a file.

    Raises:
        InputError: not a structure, or of another network.
    """
    try:
        # as JSON: there, strict pydantic takes a list for a tuple
        plan = _Plan.model_validate_json(json.dumps(found))
    except RecursionError:
        raise InputError("structure.json is damaged: it is nested too deeply. Save the network again.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise InputError(f"structure.json is damaged: {place[:100]}: {first['msg']}. Save the network again.") from None
    try:
        return _built(fresh, plan)
    except _STRANGE as error:
        if isinstance(error, InputError):
            raise
        raise _of_another(fresh, str(error)) from error


def _of_another(fresh: nn.Module, why: str) -> InputError:
    return InputError(
        f"structure.json does not belong to this {type(fresh).__name__} ({why[:300]}). Pass a new "
        "network of the same class and size."
    )


def _built(fresh: nn.Module, plan: _Plan) -> nn.Module:
    try:
        model = fresh if plan.inputs is None else _captured(fresh, plan.inputs, plan.fingerprint)
    except InputError as error:  # the saved network runs on these images
        raise _of_another(fresh, str(error).rstrip(".")) from error
    if isinstance(model, fx.GraphModule):
        assert model.meta[FINGERPRINT] == plan.fingerprint, "its operators or the settings of its layers differ"
        for cuts in plan.cuts:
            remove(model, [Cut(layer, axis, tuple(places)) for layer, axis, places in cuts])
        _insert_edges(model, plan.edges, getattr(plan, RUNTIME))
        model.meta.update({key: value for key in _KEPT if (value := getattr(plan, key)) is not None})
    for name in plan.freezable:
        norm = model.get_submodule(name)
        assert isinstance(norm, Norm), f"{name} is not a BatchNorm"
        model.set_submodule(name, freezable(norm))
    for name, parametrizations in plan.weights.items():
        layer = model.get_submodule(name)
        shape = list(cast("nn.Linear", layer).weight.shape)
        for each in parametrizations:
            _require_fit(each, shape, name)
            parametrize.register_parametrization(layer, "weight", each.made())
    return model


def _captured(fresh: nn.Module, inputs: list[_Input], fingerprint: str | None) -> fx.GraphModule:
    specs = [InputSpec(each.name, tuple(each.shape), each.dtype) for each in inputs]
    captured = capture_again(fresh, specs)
    if captured.meta[FINGERPRINT] != fingerprint:  # the saved network had run: `forward` may store a table then
        device = next((each.device for each in fresh.parameters()), None)
        with evaluating(fresh), torch.no_grad():
            run(fresh, zeros(specs, 1, device))
        captured = capture_again(fresh, specs)
    return captured


def _require_fit(laid: _Parametrization, shape: list[int], name: str) -> None:
    """Check sizes against the weight, so that a file cannot allocate more memory than the network."""
    if isinstance(laid, _Mask):
        fits = laid.mask == shape
    else:
        fits = (laid.largest if isinstance(laid, _Largest) else laid.channels) in (None, shape[0])
    assert fits, f"{name} has a weight of shape {'x'.join(map(str, shape))}"


def _insert_edges(
    graph: fx.GraphModule, edges: list[tuple[str, str, _Parametrization]], runtime: Runtime | None
) -> None:
    if edges:
        write_as_matrix_products(graph)
        if runtime == "openvino":
            rewrite_for_openvino(graph)
        graph.add_submodule("quantizers", nn.Module())
    for value, target, laid in edges:
        assert isinstance(laid, _OnGrid), f"{value} has no quantizer"
        assert laid.channels is None, f"{value} has a grid for each channel"
        moved = hasattr(graph.get_submodule("quantizers"), target.removeprefix("quantizers."))
        if not moved:
            graph.add_submodule(target, laid.made())
        read_through(graph, next(node for node in graph.graph.nodes if node.name == value), target, moved=moved)
    graph.recompile()


def _described(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, Mask):
        return {"mask": list(module.mask.shape), "gradient": module.gradient}
    if isinstance(module, RunningLargest):
        return {"largest": len(module.largest) if module.largest.ndim else None}
    if isinstance(module, FakeQuantize):
        observer, step = module.observer, module.learned_step
        return {
            "grid": [module.grid.minimum, module.grid.maximum],
            "channels": module.channels,
            "averaging": observer.averaging if isinstance(observer, MovingAverage) else None,
            "tracks_weight": isinstance(observer, WeightShare),
            "learned_step": step and {"offset": step.offset is not None, "of_images": step.of_images},
        }
    raise InputError(
        f"a weight has the parametrization {type(module).__name__}, which tersor cannot save. If it sets weights to "
        "zero, use tersor's masks (tersor.training.mask_attachment.insert_masks) instead; if it modifies weights, do "
        "that in `after_step` of your method's Attachment."
    )
