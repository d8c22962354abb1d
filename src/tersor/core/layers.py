"""What a network's layers give, beside its logits.

Of a plain network a forward hook looks, for the length of one call. A captured one has no such module to hang a hook
on: `layer3` was traced through, and may have lost channels and got quantizers since. There the tracer's memory
(`graph.meta["layers"]`: path -> node) says which node of the graph it returned, and a second graph over the same
modules gives that node too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.core.errors import InputError, nearest
from tersor.core.evaluating import evaluating

Given = tuple[Tensor, dict[str, Tensor]]
"""Logits, and what each layer gave, by its path."""


class Layers:
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
        return logits, self._checked(zip(self.paths, given[:count], given[count:], strict=True))

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
        return logits, self._checked((path, *seen[path]) for path in self.paths)

    def _checked(self, given: Iterable[tuple[str, object, int]]) -> dict[str, Tensor]:
        """What each layer gave, if it still is what it was when the layer gave it."""
        found: dict[str, Tensor] = {}
        for path, value, version in given:
            if not isinstance(value, Tensor):
                raise InputError(f"the layer {path} gives a {type(value).__name__}, not a tensor. Name another.")
            if _version(value) != version:
                raise InputError(
                    f"what the layer {path} gives is changed in place by the layer after it. Name that one, or build "
                    "it with inplace=False."
                )
            found[path] = value
        return found


def _version(value: object) -> int:
    if not isinstance(value, Tensor) or value.is_inference():
        return 0
    return value._version  # pyright: ignore[reportPrivateUsage]


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
    """The layers that each pattern (`layer3`, `layer?`) matches, in the order of the network.

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
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def shapes_of(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, torch.Size]:
    """What the layers give for `images`, seen in one dry forward in eval mode."""
    device = next((parameter.device for parameter in model.parameters()), images.device)
    with evaluating(model):
        _, given = Layers(model, paths)(images.to(device))
    return {path: value.shape for path, value in given.items()}


def last_maps(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """The last part of the network at each resolution: `layer1`, `layer2`, `layer3` of a ResNet.

    Parts are the network's children, or what lies in them where those give no two resolutions (`features.6`). What
    gives no feature map of more than one pixel is passed over.

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
        found = found or of_size
        if len(of_size) > 1:
            return tuple(of_size.values())
    if not found:
        raise InputError(f"{type(model).__name__} has no part that gives a feature map. Name its layers.")
    return tuple(found.values())


@torch.no_grad()
def _called(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, torch.Size]:
    """Shapes of those parts that are called and give a tensor, in the order of the calls."""
    if isinstance(model, fx.GraphModule):
        with evaluating(model):
            _, *given = _with_nodes(model, paths).eval()(images.to(next(model.parameters()).device))
        values = dict(zip(paths, given, strict=False))
        return {path: value.shape for path, value in values.items() if isinstance(value, Tensor)}
    seen: dict[str, torch.Size] = {}

    def keep(path: str, output: object) -> None:
        if isinstance(output, Tensor):
            seen.pop(path, None)
            seen[path] = output.shape

    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _m, _i, output, path=path: keep(path, output))
        for path in paths
    ]
    try:
        with evaluating(model):
            model(images.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def map_size(shape: torch.Size) -> tuple[int, int] | None:
    """Height and width of a feature map (N, C, H, W), or of tokens (N, L, C) that lie in a square; else None."""
    if len(shape) == 4:
        return shape[2], shape[3]
    if len(shape) == 3:
        side = int((shape[1]) ** 0.5)
        return (side, side) if side * side in (shape[1], shape[1] - 1) else None
    return None


def as_map(values: Tensor) -> Tensor:
    """(N, C, H, W) as it is; tokens (N, L, C) as (N, C, side, side), without a class token before them."""
    if values.ndim != 3:
        return values
    side = int(values.shape[1] ** 0.5)
    tokens = values[:, values.shape[1] - side * side :]
    return tokens.transpose(1, 2).reshape(len(values), values.shape[2], side, side)


def pooled(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, C, H, W), or tokens in a square -> (N, C, *size), averaged; as they are where they have that size."""
    values = as_map(values)
    return values if values.shape[2:] == size else F.adaptive_avg_pool2d(values, size)
