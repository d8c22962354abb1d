"""The number of multiplications of torch operators for which torch.utils.flop_counter has no formula.

By convention, elementwise operators, normalization, pooling, resizing and embeddings are not counted. Other operators
that multiply and have no formula, here or in torch, are reported (`multiplies_uncounted`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten
Shape = Sequence[int]


def _product(first: Shape, second: Shape, **_: Any) -> int:
    """Matrix or vector (..., m, k) times matrix or vector (k, n) or (k,)."""
    return 2 * prod(first) * prod(second[1:])


def _added_product(_added: Shape, first: Shape, second: Shape, **_: Any) -> int:
    return _product(first, second)


def _added_products(_added: Shape, first: Shape, second: Shape, **_: Any) -> int:
    """Batches of matrices (b, m, k) and (b, k, n)."""
    return 2 * prod(first) * second[2]


def _onednn_rnn(images: Shape, weight_ih: Shape, weight_hh: Shape, *_: Any, **__: Any) -> int:
    """One layer in one direction: both weights are used once per position of the sequences (T, N, features)."""
    return 2 * prod(images[:-1]) * (prod(weight_ih) + prod(weight_hh))


def _cudnn_rnn(images: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """The same for all layers and directions; vectors are biases."""
    return 2 * prod(images[:-1]) * sum(prod(weight) for weight in weights if len(weight) > 1)


def _bilinear(first: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Rows (n, i) times weight (o, i, j), times rows (n, j)."""
    outputs, _inputs, others = weight
    return 2 * first[0] * (prod(weight) + outputs * others)


_OURS: dict[Any, Callable[..., int]] = {
    _aten.mv: _product,
    _aten.dot: _product,
    _aten.vdot: _product,
    _aten._int_mm: _product,
    _aten.addmv: _added_product,
    _aten.addbmm: _added_products,
    _aten.mkldnn_rnn_layer: _onednn_rnn,
    _aten._cudnn_rnn: _cudnn_rnn,
    _aten._trilinear: _bilinear,
}

FORMULAS: dict[Any, Callable[..., int]] = FlopCounterMode(display=False, custom_mapping=_OURS).flop_registry
"""Operator -> a function of its arguments and `out_val` that returns twice the number of multiplications."""

MULTIPLICANDS = {
    **dict.fromkeys((_aten.addmm, _aten.baddbmm, _aten.addmv, _aten.addbmm), (1, 2)),
    **dict.fromkeys((_aten._trilinear,), (0, 1, 2)),
    **dict.fromkeys((_aten.mkldnn_rnn_layer,), (0, 1, 2)),
}
"""Operator -> the arguments that are multiplied; for all others, the first two."""

_MULTIPLYING = re.compile(
    r"(^|_)(fft|linalg|cholesky|lu|cdist|pdist|grid_sampler|lstm|gru|rnn|attention|b?mm|mv|dot|matmul|linear|conv\w*)"
    r"\d*(_|$)"
)
_NOT_MULTIPLYING = re.compile(
    r"norm|embedding|prelu|fused_(lstm|gru)_cell|^(linalg_(check|vector|cross|diagonal)\w*|upsample_\w*linear\w*)"
    r"|^_?(cat|stack|copy_?|fill_?|where|index\w*|gather|\w*scatter\w*)$"
    r"|^_?(masked\w*|put_?|take\w*|expand\w*|repeat\w*|roll|flip)$"
)


def multiplies_uncounted(operator: OpOverload, *, with_weight: bool) -> bool:
    """Whether an operator without a formula multiplies, or may multiply, as any operator from outside torch may.

    Args:
        operator: an operator on floating-point tensors.
        with_weight: whether its operands are an activation and a parameter.
    """
    if operator.namespace not in {"aten", "prim", "prims"}:
        return True
    name = str(operator).split(".")[1]
    if _NOT_MULTIPLYING.search(name) or torch.Tag.pointwise in operator.tags or operator.is_view:
        return False
    return with_weight or _MULTIPLYING.search(name) is not None
