"""Cross-layer equalisation: channels of two layers in a row get ranges of one size; what is computed stays as it is.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019. With ReLU between
two layers a channel may be divided by s_i > 0 in the first and multiplied by it in the second:

    s_i = sqrt(r1_i / r2_i),    r1_i = max|w1_i| * |gamma_i| / sigma_i,    r2_i = max|w2_.i|

where w1_i are the weights that make channel i, (C_out, ...) at place i of dimension 0, and w2_.i those that read it. A
BatchNorm between the two takes the division over, so that the first weight, whose channels have scales of their own,
stays as it is. The paper puts ReLU in the place of ReLU6, which changes the network; here two layers with a ReLU6
between them are left alone. Nor are high biases absorbed by the next layer, which is not exact either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tersor.graph.batchnorm import Norm, gamma_and_beta
from tersor.graph.batchnorm_behind import norm_behind
from tersor.graph.capture import layer_of, parameter_reads, sole_user
from tersor.graph.layer_selection import Layer
from tersor.graph.parametrization import parametrized
from tersor.graph.plain_modules import is_plain
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.observers import channel_maxima
from tersor.quantization.qdq_placement import is_nothing_in_eval, quantizable

_ROUNDS = 100
_CONVERGED = 1e-3
_NOTHING = 1e-8


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
    known, reads = quantizable(graph), parameter_reads(graph)
    for node in graph.graph.nodes:
        first, norm_call = layer_of(node), norm_behind(node)
        behind = sole_user(node if norm_call is None else norm_call.node)
        while behind is not None and _scales_with_its_input(behind):
            behind = sole_user(behind)
        if behind is None or not {node.target, behind.target} <= known:
            continue
        second, norm = layer_of(behind), norm_call and norm_call.module
        assert isinstance(first, Layer)
        assert isinstance(second, Layer)
        if any(reads[id(each)] > 1 for part in (first, norm, second) if part is not None for each in part.parameters()):
            continue
        if _reads_channels(first, second) and _divides(norm):
            yield _Pair(first, norm, second)


def _scales_with_its_input(node: fx.Node) -> bool:
    """Whether `node` is a ReLU, or gives what it is given: a quantizer does as long as it does not round."""
    module = layer_of(node)
    if module is not None:
        shows = isinstance(module, FakeQuantize) and not module.enabled
        return shows or (isinstance(module, nn.ReLU) and is_plain(module)) or is_nothing_in_eval(node)
    return is_nothing_in_eval(node) or node.target in {F.relu, torch.relu, torch.relu_, "relu", "relu_"}


def _divides(norm: Norm | None) -> bool:
    return norm is None or all(each is not None for each in gamma_and_beta(norm))


def _reads_channels(first: Layer, second: Layer) -> bool:
    """Whether the weights that read a channel are known: along dimension 1 of one group, along 0 if depthwise."""
    if isinstance(first, nn.Linear) or isinstance(second, nn.Linear):
        return isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return second.groups == 1 or second.groups == second.in_channels == second.out_channels


def _equalize(pair: _Pair) -> float:
    """Divides and multiplies once; how far the factors were from 1."""
    first, second = pair.first.weight, pair.second.weight
    made = channel_maxima(first)
    if pair.norm is not None:
        assert pair.norm.running_var is not None
        made = made * pair.norm.weight.abs() * torch.rsqrt(pair.norm.running_var + pair.norm.eps)
    depthwise = isinstance(pair.second, nn.Conv2d) and pair.second.groups > 1
    read = channel_maxima(second if depthwise else second.transpose(0, 1))
    alive = (made > _NOTHING) & (read > _NOTHING)
    factor = torch.where(alive, (made / read.clamp(min=_NOTHING)).sqrt(), torch.ones_like(made))
    if pair.norm is None:
        _weight(pair.first).div_(_along(factor, first, 0))
        if pair.first.bias is not None:
            pair.first.bias.div_(factor)
    else:
        pair.norm.weight.div_(factor)
        pair.norm.bias.div_(factor)
    _weight(pair.second).mul_(_along(factor, second, 0 if depthwise else 1))
    return float((factor - 1).abs().max())


def _weight(layer: Layer) -> Tensor:
    """The Parameter, whatever is laid on it."""
    weight = parametrized(layer).original if parametrize.is_parametrized(layer, "weight") else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _along(factor: Tensor, weight: Tensor, dimension: int) -> Tensor:
    return factor.reshape([-1 if each == dimension else 1 for each in range(weight.ndim)])
