"""What a network's layers give, beside its logits.

Of a plain network a forward hook looks, for the length of one call. A captured one has no such module to hang a hook
on: `layer3` was traced through, and may have lost channels and got quantizers since. There the tracer's memory
(`graph.meta["layers"]`: path -> node) says which node of the graph it returned, and a second graph over the same
modules gives that node too.

A map is handed on as (N, C, H, W), also by a layer that gives (N, H, W, C), as Swin's do; which of the two it is, the
sides of the images tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.core.errors import InputError, nearest
from tersor.graph.eval_mode import evaluating

Given = tuple[Tensor, dict[str, Tensor]]
"""Logits, and what each layer gave, by its path."""

_POOLS = nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d
_OTHER_TOKENS = 5
"""The most that lie before those of the patches: one for the class, a teacher's, or four registers."""


class FeatureExtractor:
    """Runs a network and keeps what some of its layers give.

    Args:
        model: the network, after all that is laid on it.
        paths: of modules, such as `layer3`; each is there (`matching_paths`).
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model = model
        self.paths = tuple(dict.fromkeys(paths))
        self._view: fx.GraphModule | None = None
        self._modes: list[tuple[nn.Module, nn.Module]] = []

    def __call__(self, images: Tensor) -> Given:
        """Images (N, C, H, W) -> logits (N, classes), and the layers' tensors.

        Raises:
            InputError: what a layer gave is no tensor, or is changed in place by what comes after it.
        """
        if not self.paths:
            return self.model(images), {}
        return self._viewed(images, self.model) if isinstance(self.model, fx.GraphModule) else self._hooked(images)

    def _viewed(self, images: Tensor, graph: fx.GraphModule) -> Given:
        if self._view is None:  # not before: until the first step the network may move to another device
            self._view = _with_nodes(graph, self.paths)
            pairs = [(module, graph.get_submodule(name)) for name, module in self._view.named_modules()]
            self._modes = [(mirror, module) for mirror, module in pairs if mirror is not module]
        for mirror, module in self._modes:
            mirror.training = module.training
        logits, *given = self._view(images)
        count = len(self.paths)
        return logits, self._checked(zip(self.paths, given[:count], given[count:], strict=True), images)

    def _hooked(self, images: Tensor) -> Given:
        seen: dict[str, tuple[object, int]] = {}

        def look(path: str) -> None:
            def keep(_module: nn.Module, _inputs: object, output: object) -> None:
                seen[path] = output, _version(output)

            hooks.append(self.model.get_submodule(path).register_forward_hook(keep))

        hooks: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for path in self.paths:
                look(path)
            logits = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        for path in self.paths:
            if path not in seen:
                raise InputError(f"the layer {path} is not called by the network. Name another.")
        return logits, self._checked(((path, *seen[path]) for path in self.paths), images)

    def _checked(self, given: Iterable[tuple[str, object, int]], images: Tensor) -> dict[str, Tensor]:
        """What each layer gave, if it still is what it was when the layer gave it."""
        found: dict[str, Tensor] = {}
        for path, value, version in given:
            if not isinstance(value, Tensor):
                raise InputError(f"the layer {path} gives a {type(value).__name__}, not a tensor. Name another.")
            if _version(value) != version:
                raise InputError(
                    f"what the layer {path} gives is changed in place by what comes after it. Name the layer after "
                    "it, or one before it, or build the network with inplace=False."
                )
            found[path] = channels_first(value, images)
        return found


def _version(value: object) -> int:
    if not isinstance(value, Tensor) or value.is_inference():
        return 0
    return value._version  # pyright: ignore[reportPrivateUsage]


def channels_first(value: Tensor, images: Tensor) -> Tensor:
    """A map (N, H, W, C) as (N, C, H, W), its sides being to each other as those of the images; all else as it is."""
    if value.ndim != 4 or _alike(value.shape[2:], images) or not _alike(value.shape[1:3], images):
        return value
    return value.permute(0, 3, 1, 2)


def _alike(sides: Sequence[int], images: Tensor) -> bool:
    """Whether these are to each other as the sides of the images, but for rounding."""
    height, width = images.shape[-2:]
    return abs(sides[0] * width - sides[1] * height) <= max(height, width)


def _with_nodes(graph: fx.GraphModule, paths: Sequence[str]) -> fx.GraphModule:
    """A second graph over the same modules: behind the logits, the layers' values, and the versions they had."""
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
    """Of the layers whose output can be had."""
    if isinstance(model, fx.GraphModule):
        return list(model.meta["layers"])
    return [path for path, _ in model.named_modules() if path]


def matching_paths(model: nn.Module, patterns: Sequence[str], whose: str) -> tuple[str, ...]:
    """The layers that each pattern (`layer3`, `layer?`) matches: pattern by pattern, in the order of the network.

    Raises:
        InputError: a pattern matches none.
    """
    known = layer_paths(model)
    found: list[str] = []
    for pattern in patterns:
        matched = [path for path in known if fnmatchcase(path, pattern)]
        if not matched:
            close = nearest(pattern, known)
            hint = f" Did you mean '{close}'?" if close else ""
            tops = ", ".join(path for path in known if "." not in path)
            raise InputError(f"{whose} has no layer '{pattern}'.{hint} Possible: {tops}, and what lies in them.")
        found += matched
    return tuple(found)


@torch.no_grad()
def shapes_of(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, torch.Size]:
    """What the layers give for `images`, seen in one dry forward in eval mode."""
    with evaluating(model):
        _, given = FeatureExtractor(model, paths)(images.to(next(model.parameters(), images)))
    return {path: value.shape for path, value in given.items()}


def last_feature_maps(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """The last part of the network at each resolution: `layer1`, `layer2`, `layer3` of a ResNet.

    Parts are the network's children, or what lies in them where that tells more resolutions apart (`features.6`). Pools
    are passed over, and what gives no feature map of more than one pixel, or one that is changed in place behind it.

    Raises:
        InputError: there is no such part.
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
        raise InputError(f"{type(model).__name__} has no part that gives a feature map. Name its layers.")
    return tuple(found.values())


@torch.no_grad()
def _called(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, torch.Size]:
    """Shapes of those parts that are called and give a tensor which then stays, in the order of the calls."""
    seen: dict[str, tuple[object, int]] = {}

    def keep(path: str, output: object) -> None:
        seen.pop(path, None)
        seen[path] = output, _version(output)

    images = images.to(next(model.parameters()))
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    with evaluating(model):
        if isinstance(model, fx.GraphModule):
            _, *given = _with_nodes(model, paths).eval()(images)
            count = len(paths)
            seen = dict(zip(paths, zip(given[:count], given[count:], strict=True), strict=True))
        else:
            try:
                for path in paths:
                    look = partial(keep, path)
                    hooks.append(model.get_submodule(path).register_forward_hook(lambda _m, _i, out, to=look: to(out)))
                model(images)
            finally:
                for hook in hooks:
                    hook.remove()
    stays = {path: value for path, (value, version) in seen.items() if _version(value) == version}
    maps = {path: channels_first(value, images) for path, value in stays.items() if isinstance(value, Tensor)}
    return {
        path: value.shape
        for path, value in maps.items()
        if not _is_pool(model, path) and (value.ndim != 4 or _alike(value.shape[2:], images))
    }


def _is_pool(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), _POOLS)
    except AttributeError:  # traced through
        return False


def map_size(shape: torch.Size) -> tuple[int, int] | None:
    """Height and width of a feature map (N, C, H, W), or of tokens (N, L, C) that lie in a square; else None."""
    if len(shape) == 4:
        return shape[2], shape[3]
    if len(shape) == 3:
        side = math.isqrt(shape[1])
        return (side, side) if shape[1] - side * side <= (_OTHER_TOKENS if side > 2 else 1) else None
    return None


def as_map(values: Tensor) -> Tensor:
    """(N, C, H, W) as it is; tokens (N, L, C) as (N, C, side, side), without those of no place before them."""
    if values.ndim != 3:
        return values
    side = math.isqrt(values.shape[1])
    tokens = values[:, values.shape[1] - side * side :]
    return tokens.transpose(1, 2).reshape(len(values), values.shape[2], side, side)


def pooled(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, C, H, W), or tokens in a square -> (N, C, *size), averaged; as they are where they have that size."""
    values = as_map(values)
    return values if values.shape[2:] == size else F.adaptive_avg_pool2d(values, size)
