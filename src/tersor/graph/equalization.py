"""Cross-layer equalisation: channels of two layers in a row get ranges of one size; what is computed stays as it is.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019. With ReLU between
two layers a channel may be divided by s_i > 0 in the first and multiplied by it in the second:

    s_i = sqrt(r1_i / r2_i),    r1_i = max|w1_i| * |gamma_i| / sigma_i,    r2_i = max|w2_.i|

where w1_i are the weights that make channel i, (C_out, ...) at place i of dimension 0, and w2_.i those that read it. A
BatchNorm between the two takes the division over, so that the first weight, whose channels have scales of their own,
stays as it is. The paper puts ReLU in the place of ReLU6, which changes the network; here two layers with a ReLU6
between them are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tersor.core.parametrization import FakeQuantize, parametrized
from tersor.core.ranges import channel_maxima
from tersor.core.selection import Layer
from tersor.graph.capture import layer_of, sole_user
from tersor.graph.placement import is_nothing_in_eval

_ROUNDS = 20
_CONVERGED = 1e-3
_NOTHING = 1e-8
Norm = nn.BatchNorm2d | nn.BatchNorm1d


@dataclass(frozen=True)
class _Pair:
    """Two layers in a row: what `first` gives is read by `second` alone, behind `norm` and a ReLU."""

    first: Layer
    norm: Norm | None
    second: Layer


@torch.no_grad()
def equalize(graph: fx.GraphModule) -> int:
    """Equalises the ranges of all layers in a row, again and again until they change no more; how many pairs.

    Args:
        graph: a captured network; its weights, biases and BatchNorms are changed, what it computes is not.
    """
    pairs = list(_pairs(graph))
    for _ in range(_ROUNDS if pairs else 0):
        if max(_equalize(pair) for pair in pairs) < _CONVERGED:
            break
    return len(pairs)


def _pairs(graph: fx.GraphModule) -> Iterator[_Pair]:
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    for node in graph.graph.nodes:
        first, norm, behind = layer_of(node), None, sole_user(node)
        if not isinstance(first, Layer):
            continue
        if behind is not None and isinstance(layer_of(behind), Norm):
            norm, behind = layer_of(behind), sole_user(behind)
        while behind is not None and _scales_with_its_input(behind):
            behind = sole_user(behind)
        second = layer_of(behind) if behind is not None else None
        if behind is None or not isinstance(second, Layer):
            continue
        if max(calls.count(node.target), calls.count(behind.target)) > 1:
            continue
        assert norm is None or isinstance(norm, Norm)
        if _reads_channels(first, second) and (norm is None or (norm.affine and norm.running_var is not None)):
            yield _Pair(first, norm, second)


def _scales_with_its_input(node: fx.Node) -> bool:
    """Whether a multiple of the input gives the same multiple; a quantizer that does not round yet will follow."""
    return _is_relu(node) or is_nothing_in_eval(node) or isinstance(layer_of(node), FakeQuantize)


def _is_relu(node: fx.Node) -> bool:
    return isinstance(layer_of(node), nn.ReLU) or node.target in {F.relu, torch.relu, torch.relu_, "relu", "relu_"}


def _reads_channels(first: Layer, second: Layer) -> bool:
    """Whether the weights that read a channel are known: along dimension 1 of one group, along 0 if depthwise."""
    if isinstance(first, nn.Linear) or isinstance(second, nn.Linear):
        return isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return second.groups == 1 or second.groups == second.in_channels == second.out_channels


def _equalize(pair: _Pair) -> float:
    """Divides and multiplies once; how far the factors were from 1."""
    first, second = _weight(pair.first), _weight(pair.second)
    made = channel_maxima(first)
    if pair.norm is not None:
        assert pair.norm.running_var is not None
        made = made * pair.norm.weight.abs() * torch.rsqrt(pair.norm.running_var + pair.norm.eps)
    depthwise = isinstance(pair.second, nn.Conv2d) and pair.second.groups > 1
    read = channel_maxima(second if depthwise else second.transpose(0, 1))
    alive = (made > _NOTHING) & (read > _NOTHING)
    factor = torch.where(alive, (made / read.clamp(min=_NOTHING)).sqrt(), torch.ones_like(made))
    if pair.norm is None:
        first.div_(_along(factor, first, 0))
        if pair.first.bias is not None:
            pair.first.bias.div_(factor)
    else:
        pair.norm.weight.div_(factor)
        pair.norm.bias.div_(factor)
    second.mul_(_along(factor, second, 0 if depthwise else 1))
    return float((factor - 1).abs().max())


def _weight(layer: Layer) -> Tensor:
    """The Parameter, whatever is laid on it."""
    weight = parametrized(layer).original if parametrize.is_parametrized(layer, "weight") else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _along(factor: Tensor, weight: Tensor, dimension: int) -> Tensor:
    return factor.reshape([-1 if each == dimension else 1 for each in range(weight.ndim)])
