"""Attention with fewer or narrower heads than the embedding is wide, which torch and torchvision do not support."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """`nn.MultiheadAttention` with pruned heads: the same parameters under the same keys, and the original scale.

    in_proj_weight    (3 heads width, E)
    out_proj.weight   (E, heads width)
    """

    in_proj_bias: Tensor | None

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight = original.in_proj_weight
        self.register_parameter("in_proj_bias", original.in_proj_bias)
        self.out_proj = original.out_proj
        self.num_heads = original.num_heads
        self.scale = original.head_dim**-0.5
        self.dropout = original.dropout
        self.batch_first = original.batch_first
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend; return a tensor of the query's shape, and None for the weights. Without batch_first, N is second.

        Args:
            query: (N, tokens, E).
            key: as query.
            value: as query.
            key_padding_mask: must be None.
            need_weights: ignored.
            attn_mask: added to the scores, or bool: False masks a position.
        """
        assert key_padding_mask is None
        if not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = [
            F.linear(each, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(*heads, attn_mask=attn_mask, dropout_p=dropout, scale=self.scale)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), None


def windowed_attention(
    images: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    relative_position_bias: Tensor,
    window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    training: bool = True,
    *,
    scale: float,
) -> Tensor:
    """torchvision's `shifted_window_attention` for heads that together are narrower than the images (N, H, W, C).

    The arguments are torchvision's, and `scale`, which query times key is multiplied with where no `logit_scale`
    (heads, 1, 1) is learned (Swin Transformer V2).
    """
    size, shift, padded = _padded(images, window_size, shift_size)
    windows = _windows(torch.roll(padded, (-shift[0], -shift[1]), (1, 2)) if sum(shift) else padded, size)
    if logit_scale is not None and qkv_bias is not None:
        third = len(qkv_bias) // 3
        qkv_bias = torch.cat([qkv_bias[:third], torch.zeros_like(qkv_bias[:third]), qkv_bias[2 * third :]])
    qkv = F.linear(windows, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if logit_scale is not None:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        scores = query @ key.transpose(-2, -1) * logit_scale.clamp(max=math.log(100.0)).exp()
    else:
        scores = (query * scale) @ key.transpose(-2, -1)
    scores = scores + relative_position_bias
    if sum(shift):
        mask = _shift_mask(padded, size, shift)
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    weights = F.dropout(scores.softmax(-1), attention_dropout, training)
    output = F.linear((weights @ value).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    output = _images(F.dropout(output, dropout, training), size, padded.shape)
    if sum(shift):
        output = torch.roll(output, (shift[0], shift[1]), (1, 2))
    return output[:, : images.shape[1], : images.shape[2]].contiguous()


def _padded(images: Tensor, size: Sequence[int], shift: Sequence[int]) -> tuple[list[int], list[int], Tensor]:
    """Pad images to whole windows; a dimension within one window is not shifted."""
    height, width = images.shape[1:3]
    padded = F.pad(images, (0, 0, 0, -width % size[1], 0, -height % size[0]))
    sides = padded.shape[1:3]
    moved = [0 if each >= side else far for each, side, far in zip(size, sides, shift, strict=True)]
    return list(size), moved, padded


def _windows(images: Tensor, size: Sequence[int]) -> Tensor:
    """(N, H, W, C) -> (N windows, positions, C)."""
    parts = images.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _images(windows: Tensor, size: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(N windows, positions, C) -> (N, H, W, C)."""
    parts = windows.unflatten(1, (size[0], size[1])).unflatten(0, (-1, shape[1] // size[0], shape[2] // size[1]))
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _shift_mask(images: Tensor, size: Sequence[int], shift: Sequence[int]) -> Tensor:
    """(windows, positions, positions): -100 between positions that were not neighbours before the shift."""
    region = images.new_zeros((1, *images.shape[1:3], 1))
    number = 0
    for rows in (slice(0, -size[0]), slice(-size[0], -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -size[1]), slice(-size[1], -shift[1]), slice(-shift[1], None)):
            region[:, rows, columns] = number
            number += 1
    regions = _windows(region, size).squeeze(-1)
    apart = regions.unsqueeze(1) != regions.unsqueeze(2)
    return torch.where(apart, -100.0, 0.0).to(images.dtype)
