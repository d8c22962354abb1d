"""Coupling rules for the functions of torchvision's Swin Transformers, which torch.fx keeps as single nodes."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule
from tersor.pruning.dependency.union_find import TrackedShape


def shifted_window_attention(propagation: ChannelPropagation, call: Call) -> Any:
    """Heads, or positions within every head, are coupled in query, key, value and the relative position bias."""
    images, weight, projection, bias, _, heads = call.args[:6]
    couple, reason = propagation.sets.couple, f"{call.node.name} combines them with a tensor that cannot shrink"
    embedding = couple(images.ids[-1], weight.ids[1], reason)
    inner = weight.ids[0]
    if inner is None:
        return propagation.freeze(call)
    parts = inner.reshape(3, heads, -1)
    merged = propagation.merge_split(parts, 1, 2)
    if (qkv_bias := call.kwargs.get("qkv_bias")) is not None:
        couple(inner, qkv_bias.ids[0], reason)
    couple(parts[2].reshape(-1), projection.ids[1], reason)
    for each, axis in ((bias, 1), (call.kwargs.get("logit_scale"), 0)):
        if each is not None:
            couple(
                each.ids[axis],
                None if propagation.inner else merged,
                f"{call.node.name} depends on the number of heads",
            )
    if not propagation.inner:
        propagation.track_argument(call, "args.5", heads, merged)
    counted = inner if embedding is None else np.concatenate([embedding, inner])
    propagation.track_argument(call, "windowed", parts.shape[2], counted)
    out = projection.ids[0]
    if (proj_bias := call.kwargs.get("proj_bias")) is not None:
        out = couple(out, proj_bias.ids[0], reason)
    return TrackedShape(tuple(call.output), (*images.ids[:-1], out))


def patch_merging(_: ChannelPropagation, call: Call) -> TrackedShape:
    """(N, H, W, C) -> (N, H / 2, W / 2, 4 C): the channels of four neighbouring pixels."""
    ids = call.args[0].ids
    return TrackedShape(tuple(call.output), (*ids[:-1], None if ids[-1] is None else np.tile(ids[-1], 4)))


def relative_position_bias(propagation: ChannelPropagation, call: Call) -> TrackedShape:
    """A table (positions, heads) -> (1, heads, positions, positions)."""
    table = call.args[0]
    propagation.sets.freeze(table.ids[0], f"{call.node.name} selects rows by their index")
    return TrackedShape(tuple(call.output), (None, table.ids[1], None, None))


RULES: dict[str, Rule] = {
    "shifted_window_attention": shifted_window_attention,
    "_patch_merging_pad": patch_merging,
    "_get_relative_position_bias": relative_position_bias,
}
