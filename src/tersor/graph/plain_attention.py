"""nn.MultiheadAttention written with one linear layer per projection, for export.

torch's own `forward` folds heads into the batch dimension: (L, N heads, width). There, no dimension counts the heads,
so none can be removed. This module has the same parameters under the same keys, and a dimension for the heads.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.graph.plain_modules import is_plain


class PlainAttention(nn.MultiheadAttention):
    """The forward method of `nn.MultiheadAttention` in eval mode; torch's own if there is a key padding mask."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: the attended values, and the weights if `need_weights`."""
        if key_padding_mask is not None or query.ndim != 3:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        same = query is key and key is value
        inputs = [each if self.batch_first else each.transpose(0, 1) for each in (query, key, value)]
        query, key, value = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in self._projected(inputs, same=same)
        )
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # True: not attended
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, -math.inf)
        weights = None
        if need_weights:
            scores = query * self.head_dim**-0.5 @ key.transpose(-2, -1)
            weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
            attended = weights @ value
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=self.head_dim**-0.5)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _projected(self, inputs: list[Tensor], *, same: bool) -> list[Tensor]:
        weight, bias = self.in_proj_weight, cast("Tensor | None", self.in_proj_bias)
        if same:
            return list(F.linear(inputs[0], weight, bias).chunk(3, -1))
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(*each) for each in zip(inputs, weight.chunk(3), biases, strict=True)]


def with_plain_attention(network: nn.Module) -> nn.Module:
    """`network`, changed in place: each `nn.MultiheadAttention` that `PlainAttention` can compute is replaced."""
    for path, module in list(network.named_modules()):
        if path and isinstance(module, nn.MultiheadAttention) and is_plain(module) and _is_supported(module):
            plain = object.__new__(PlainAttention)
            plain.__dict__.update(vars(module))
            network.set_submodule(path, plain)
    return network


def _is_supported(module: nn.MultiheadAttention) -> bool:
    packed = getattr(module, "in_proj_weight", None) is not None
    return packed and getattr(module, "bias_k", None) is None and not module.add_zero_attn
