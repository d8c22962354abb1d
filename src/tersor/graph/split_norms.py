"""Splitting a BatchNorm with a built-in activation into a BatchNorm node and an activation node.

timm builds EfficientNet, MobileNet, RegNet and others from `BatchNormAct2d`: a subclass of BatchNorm that calls its
children `drop` and `act` after normalizing. A single node can be neither folded nor fused. It is split if both parts
together compute the same: outputs on random values, and running statistics after a step, are compared.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from tersor.graph.batchnorm import Norm
from tersor.graph.plain_modules import has_plain_forward, is_hooked, is_plain

_PLAIN: tuple[type[Norm], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_POSITIONS = {nn.BatchNorm1d: (9,), nn.BatchNorm3d: (2, 3, 3)}
_STD = 4.0  # of the random values, so that a ReLU6 clips some
_CLOSE = 1e-5
_FAILURES = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def split_norms(graph: fx.GraphModule) -> dict[str, str]:
    """Split the BatchNorms of `graph` where possible; returns the name of a split node -> the name of its last part."""
    split: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        norm = graph.get_submodule(node.target) if node.op == "call_module" else None
        if (
            not isinstance(norm, Norm)
            or has_plain_forward(norm)
            or is_hooked(norm)
            or len(node.args) != 1
            or node.kwargs
        ):
            continue
        plain = _plain_part(norm)
        if plain is not None:
            graph.set_submodule(node.target, plain)
            split[node.name] = _call_children(graph, node, plain)
    if split:
        graph.recompile()
    return split


def _plain_part(norm: Norm) -> Norm | None:
    """torch's BatchNorm with the same tensors and children, if `norm` computes that and then calls its children."""
    kind = next(each for each in type(norm).__mro__ if each in _PLAIN)
    plain: Norm = object.__new__(kind)
    plain.__dict__.update(vars(norm))
    own_mode = type(norm).train is not nn.Module.train or type(norm).eval is not nn.Module.eval
    if own_mode or not is_plain(plain) or norm.running_mean is None:
        return None
    try:
        return plain if _computes_the_same(norm, plain) else None
    except _FAILURES:  # it takes other inputs
        return None


@torch.no_grad()
def _computes_the_same(norm: Norm, plain: Norm) -> bool:
    """Compares outputs in training and eval mode, and then the running statistics."""
    kind = next(each for each in type(norm).__mro__ if each in _PLAIN)
    shape = (4, norm.num_features, *_POSITIONS.get(kind, (3, 3)))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * _STD
    assert norm.running_mean is not None
    drawn = drawn.to(norm.running_mean)
    whole, parts = copy.deepcopy(norm), copy.deepcopy(plain)
    for mode in (True, False):
        outputs: list[Tensor] = []
        for module in (whole, parts):
            module.train(mode)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                found = module(drawn.clone())
                outputs.append(found if module is whole else _behind(parts, found))
        if not _all_close(*outputs):
            return False
    return all(_all_close(each, parts.get_buffer(name)) for name, each in whole.named_buffers())


def _behind(norm: Norm, values: Tensor) -> Tensor:
    for _, child in _children(norm):
        values = child(values)
    return values


def _children(norm: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in norm.named_children() if type(child) is not nn.Identity]


def _all_close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=_CLOSE, atol=_CLOSE)


def _call_children(graph: fx.GraphModule, node: fx.Node, plain: Norm) -> str:
    """Inserts calls of the children after `node`; returns the name of the last node."""
    last = node
    for name, _ in _children(plain):
        with graph.graph.inserting_after(last):
            following = graph.graph.call_module(f"{node.target}.{name}", (last,))
        last.replace_all_uses_with(following, delete_user_cb=lambda user, following=following: user is not following)
        last = following
    return last.name
