"""Cross-layer equalization: equalizes the channel ranges of consecutive layers without changing the network's output.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019. With ReLU between
two layers, channel i can be divided by s_i > 0 in the first and multiplied by it in the second:

    s_i = sqrt(r1_i / r2_i),    r1_i = max|w1_i| * |gamma_i| / sigma_i,    r2_i = max|w2_.i|

w1_i are the weights that produce channel i, row i of (C_out, ...), and w2_.i those that read it. A BatchNorm between
the two takes the division, so the first weight, whose channels have scales of their own, stays unchanged. The paper
replaces ReLU6 by ReLU, which changes the network; here layers with a ReLU6 in between are skipped. High biases are not
absorbed by the next layer, because that is not exact either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tersor.graph.aten import operator_name
from tersor.graph.batchnorm import Norm, gamma_and_beta
from tersor.graph.batchnorm_behind import norm_behind
from tersor.graph.capture import layer_of, parameter_reads, sole_user
from tersor.graph.layer_selection import Convolution, Layer
from tersor.graph.parametrization import original_weight
from tersor.graph.plain_modules import is_plain
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.observers import channel_maxima
from tersor.quantization.qdq_placement import is_nothing_in_eval, quantizable

_ROUNDS = 100
_CONVERGED = 1e-3
_SMALLEST = 1e-8


@dataclass(frozen=True)
class _Pair:
    """Consecutive layers: only `second` reads the output of `first`, after `norm` and a ReLU."""

    first: Layer
    norm: Norm | None
    second: Layer


@torch.no_grad()
def equalize(graph: fx.GraphModule) -> int:
    """Equalize all pairs of consecutive layers until the ranges converge; returns the number of pairs.

    Args:
        graph: a captured network; its weights, biases and BatchNorms change, its outputs do not.
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
    """Whether `node` is a ReLU, or returns its input, as a disabled quantizer does."""
    module = layer_of(node)
    if module is not None:
        disabled = isinstance(module, FakeQuantize) and not module.enabled
        return disabled or (isinstance(module, nn.ReLU) and is_plain(module)) or is_nothing_in_eval(node)
    return is_nothing_in_eval(node) or operator_name(node) in {"relu", "relu_"}


def _divides(norm: Norm | None) -> bool:
    return norm is None or all(each is not None for each in gamma_and_beta(norm))


def _reads_channels(first: Layer, second: Layer) -> bool:
    """Whether one slice of the second weight reads each channel: of dimension 1 with one group, of 0 if depthwise."""
    if isinstance(first, nn.Linear) or isinstance(second, nn.Linear):
        return isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return second.groups == 1 or second.groups == second.in_channels == second.out_channels


def _equalize(pair: _Pair) -> float:
    """Scale each channel by a factor, and return the largest difference of a factor from 1."""
    first, second = pair.first.weight, pair.second.weight
    produced = channel_maxima(first)
    if pair.norm is not None:
        assert pair.norm.running_var is not None
        produced = produced * pair.norm.weight.abs() * torch.rsqrt(pair.norm.running_var + pair.norm.eps)
    depthwise = isinstance(pair.second, Convolution) and pair.second.groups > 1
    read = channel_maxima(second if depthwise else second.transpose(0, 1))
    alive = (produced > _SMALLEST) & (read > _SMALLEST)
    factor = torch.where(alive, (produced / read.clamp(min=_SMALLEST)).sqrt(), torch.ones_like(produced))
    if pair.norm is None:
        original_weight(pair.first).div_(_along(factor, first, 0))
        if pair.first.bias is not None:
            pair.first.bias.div_(factor)
    else:
        pair.norm.weight.div_(factor)
        pair.norm.bias.div_(factor)
    original_weight(pair.second).mul_(_along(factor, second, 0 if depthwise else 1))
    return float((factor - 1).abs().max())


def _along(factor: Tensor, weight: Tensor, dimension: int) -> Tensor:
    return factor.reshape([-1 if each == dimension else 1 for each in range(weight.ndim)])
