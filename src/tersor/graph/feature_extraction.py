"""Feature extraction: the outputs of inner layers, together with those of the network.

A plain network gets forward hooks for the length of one call. A captured network has no module to hook: `layer3` was
traced through, and may since have lost channels and gained quantizers. There, the tracer's record
(`graph.meta["layers"]`: path -> node) gives the node of the layer's output, and a second graph over the same modules
returns that node too.

Feature maps are returned as (N, C, H, W), also for layers that output (N, H, W, C), such as Swin's; the aspect ratio of
the images decides which of the two layouts it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.core.errors import InputError, nearest
from tersor.data.network_inputs import NetworkInput, tensors_of
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run

Features = tuple[Any, dict[str, Tensor]]
"""What the network returns, and the outputs of layers by path."""

_POOLS = nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d
_OTHER_TOKENS = 5
"""Largest number of tokens before those of the patches: a class token, or four registers too."""


class FeatureExtractor:
    """Runs a network and returns the outputs of some layers.

    Args:
        model: the network, with its parametrizations and quantizers.
        paths: paths of existing modules, such as `layer3` (`matching_paths`).
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model = model
        self.paths = tuple(dict.fromkeys(paths))
        self._graph: fx.GraphModule | None = None

    def __call__(self, images: NetworkInput, *others: Any) -> Features:
        """Images (N, C, H, W) -> the network's outputs, and the layers' outputs.

        Args:
            images: the first argument of the network.
            others: its other arguments, such as the targets of a detector in training mode.

        Raises:
            InputError: the output of a layer is not a tensor, or is changed in place by a later layer.
        """
        if not self.paths:
            return run(self.model, images, *others), {}
        if isinstance(self.model, fx.GraphModule):
            return self._traced(images, self.model)
        return self._hooked(images, *others)

    def _traced(self, images: NetworkInput, graph: fx.GraphModule) -> Features:
        if self._graph is None:  # not earlier: the network may move to another device before the first step
            self._graph = _with_nodes(graph, self.paths)
        returned, *outputs = run(self._graph, images)
        count = len(self.paths)
        return returned, self._checked(zip(self.paths, outputs[:count], outputs[count:], strict=True), images)

    def _hooked(self, images: NetworkInput, *others: Any) -> Features:
        seen: dict[str, tuple[object, int]] = {}

        def register(path: str) -> None:
            def record(_module: nn.Module, _inputs: object, output: object) -> None:
                seen[path] = output, _version(output)

            hooks.append(self.model.get_submodule(path).register_forward_hook(record))

        hooks: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for path in self.paths:
                register(path)
            returned = run(self.model, images, *others)
        finally:
            for hook in hooks:
                hook.remove()
        for path in self.paths:
            if path not in seen:
                raise InputError(f"the layer {path} is not called by the network. Choose another layer.")
        return returned, self._checked(((path, *seen[path]) for path in self.paths), images)

    def _checked(self, outputs: Iterable[tuple[str, object, int]], images: NetworkInput) -> dict[str, Tensor]:
        """The output of each layer, if no later layer has changed it in place."""
        found: dict[str, Tensor] = {}
        for path, value, version in outputs:
            if not isinstance(value, Tensor):
                raise InputError(
                    f"the output of layer {path} is of type {type(value).__name__}, not a tensor. Choose another layer."
                )
            if _version(value) != version:
                raise InputError(
                    f"the output of layer {path} is changed in place by a later layer. Choose the layer after it, or "
                    "one before it, or build the network with inplace=False."
                )
            found[path] = channels_first(value, images)
        return found


def _version(value: object) -> int:
    if not isinstance(value, Tensor) or value.is_inference():
        return 0
    return value._version  # pyright: ignore[reportPrivateUsage]


def channels_first(value: Tensor, images: NetworkInput) -> Tensor:
    """A map (N, H, W, C) with the aspect ratio of the images as (N, C, H, W); everything else unchanged."""
    if value.ndim != 4 or _same_aspect(value.shape[2:], images) or not _same_aspect(value.shape[1:3], images):
        return value
    return value.permute(0, 3, 1, 2)


def _same_aspect(sides: Sequence[int], images: NetworkInput) -> bool:
    """Whether these sides have the aspect ratio of the images, up to rounding; true for inputs without images."""
    image = next((each for each in tensors_of(images) if each.ndim >= 4), None)
    if image is None:
        return True
    height, width = image.shape[-2:]
    return abs(sides[0] * width - sides[1] * height) <= max(height, width)


def _with_nodes(graph: fx.GraphModule, paths: Sequence[str]) -> fx.GraphModule:
    """A second graph over the same modules, which returns the logits, the layers' outputs, and their versions."""
    returned: dict[str, str] = graph.meta["layers"]
    copied: dict[fx.Node, fx.Node] = {}
    wider = fx.Graph()
    logits = wider.graph_copy(graph.graph, copied)
    by_name = {node.name: copied[node] for node in graph.graph.nodes if node in copied}
    nodes = [by_name[returned[path]] for path in paths]
    versions: list[fx.Node] = []
    for node in nodes:
        with wider.inserting_after(node):
            versions.append(wider.call_function(_version, (node,)))
    wider.output((logits, *nodes, *versions))
    return fx.GraphModule(graph, wider)


def layer_paths(model: nn.Module) -> list[str]:
    """The paths of the layers whose output is available."""
    if isinstance(model, fx.GraphModule):
        return list(model.meta["layers"])
    return [path for path, _ in model.named_modules() if path]


def matching_paths(model: nn.Module, patterns: Sequence[str], whose: str) -> tuple[str, ...]:
    """The layers that match each pattern (`layer3`, `layer?`), pattern by pattern, in network order.

    Raises:
        InputError: a pattern matches no layer.
    """
    known = layer_paths(model)
    found: list[str] = []
    for pattern in patterns:
        matched = [path for path in known if fnmatchcase(path, pattern)]
        if not matched:
            close = nearest(pattern, known)
            hint = f" Did you mean '{close}'?" if close else ""
            tops = ", ".join(path for path in known if "." not in path)
            raise InputError(f"{whose} has no layer '{pattern}'.{hint} Possible: {tops}, and layers inside them.")
        found += matched
    return tuple(found)


@torch.no_grad()
def shapes_of(model: nn.Module, paths: Sequence[str], images: NetworkInput) -> dict[str, torch.Size]:
    """Shapes of the layers' outputs for `images`, from one forward pass in eval mode."""
    with evaluating(model):
        _, outputs = FeatureExtractor(model, paths)(images.to(next(model.parameters())))
    return {path: value.shape for path, value in outputs.items()}


def last_feature_maps(model: nn.Module, images: NetworkInput) -> tuple[str, ...]:
    """The last module at each resolution: `layer1`, `layer2`, `layer3` of a ResNet.

    Modules are the network's children, or deeper ones if these have more resolutions (`features.6`). Pooling
    layers are skipped, and so are modules whose output has one pixel, is not a feature map, or is changed in place by a
    later layer.

    Raises:
        InputError: there is no such module.
    """
    shapes = _called(model, layer_paths(model), images)
    found: dict[tuple[int, ...], str] = {}
    for depth in range(1 + max((path.count(".") for path in shapes), default=0)):
        of_size: dict[tuple[int, ...], str] = {}
        for path, shape in shapes.items():
            size = map_size(shape)
            if path.count(".") == depth and size is not None and size[0] * size[1] > 1:
                of_size.pop(size, None)
                of_size[size] = path
        if len(of_size) > len(found):
            found = of_size
    if not found:
        raise InputError(
            f"no module of {type(model).__name__} returns a feature map. Set the method's `layers` and "
            "`teacher_layers` (or `layer` and `teacher_layer`) to the paths of the layers to compare."
        )
    return tuple(found.values())


@torch.no_grad()
def _called(model: nn.Module, paths: Sequence[str], images: NetworkInput) -> dict[str, torch.Size]:
    """Shapes of the outputs that are tensors and are not changed in place, in the order of the calls."""
    seen: dict[str, tuple[object, int]] = {}

    def keep(path: str, output: object) -> None:
        seen.pop(path, None)
        seen[path] = output, _version(output)

    images = images.to(next(model.parameters()))
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    with evaluating(model):
        if isinstance(model, fx.GraphModule):
            _, *outputs = run(_with_nodes(model, paths).eval(), images)
            count = len(paths)
            seen = dict(zip(paths, zip(outputs[:count], outputs[count:], strict=True), strict=True))
        else:
            try:
                for path in paths:
                    look = partial(keep, path)
                    hooks.append(model.get_submodule(path).register_forward_hook(lambda _m, _i, out, to=look: to(out)))
                run(model, images)
            finally:
                for hook in hooks:
                    hook.remove()
    stays = {path: value for path, (value, version) in seen.items() if _version(value) == version}
    maps = {path: channels_first(value, images) for path, value in stays.items() if isinstance(value, Tensor)}
    return {
        path: value.shape
        for path, value in maps.items()
        if not _is_pool(model, path) and (value.ndim != 4 or _same_aspect(value.shape[2:], images))
    }


def _is_pool(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), _POOLS)
    except AttributeError:  # traced through
        return False


def map_size(shape: torch.Size) -> tuple[int, int] | None:
    """Height and width of a feature map (N, C, H, W), or of tokens (N, L, C) in a square; else None."""
    if len(shape) == 4:
        return shape[2], shape[3]
    if len(shape) == 3:
        side = math.isqrt(shape[1])
        return (side, side) if shape[1] - side * side <= (_OTHER_TOKENS if side > 2 else 1) else None
    return None


def as_map(values: Tensor) -> Tensor:
    """(N, C, H, W) unchanged; tokens (N, L, C) as (N, C, side, side), without class and register tokens."""
    if values.ndim != 3:
        return values
    side = math.isqrt(values.shape[1])
    tokens = values[:, values.shape[1] - side * side :]
    return tokens.transpose(1, 2).reshape(len(values), values.shape[2], side, side)


def pooled(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Average maps (N, C, H, W), or tokens in a square, to (N, C, *size); maps of that size stay unchanged."""
    values = as_map(values)
    return values if values.shape[2:] == size else F.adaptive_avg_pool2d(values, size)
