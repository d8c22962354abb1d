"""Rules for the functions of torchvision's Swin Transformers, which torch.fx keeps whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule
from tersor.pruning.dependency.union_find import Labelled


def shifted_window_attention(walk: ChannelPropagation, call: Call) -> Any:
    """Heads (or places of every head) go from query, key and value at once, and from the bias of their scores."""
    given, weight, projection, bias, _, heads = call.args[:6]
    why = f"{call.node.name} reads them beside what cannot shrink"
    read = walk.atoms.match(given.atoms[-1], weight.atoms[1], why)
    inner = weight.atoms[0]
    if inner is None:
        return walk.keep(call)
    parts = inner.reshape(3, heads, -1)
    carried = walk.either(parts, 1, 2)
    if (of_qkv := call.kwargs.get("qkv_bias")) is not None:
        walk.atoms.match(inner, of_qkv.atoms[0], why)
    walk.atoms.match(parts[2].reshape(-1), projection.atoms[1], why)
    for each, place in ((bias, 1), (call.kwargs.get("logit_scale"), 0)):
        if each is not None:
            walk.atoms.match(each.atoms[place], None if walk.inner else carried, f"{call.node.name} counts its heads")
    if not walk.inner:
        walk.literal(call, "args.5", heads, carried)
    walk.literal(call, "windowed", parts.shape[2], inner if read is None else np.concatenate([read, inner]))
    made = projection.atoms[0]
    if (of_projection := call.kwargs.get("proj_bias")) is not None:
        made = walk.atoms.match(made, of_projection.atoms[0], why)
    return Labelled(tuple(call.gives), (*given.atoms[:-1], made))


def patch_merging(_: ChannelPropagation, call: Call) -> Labelled:
    """(N, H, W, C) -> (N, H / 2, W / 2, 4 C): four pixels beside each other."""
    given = call.args[0]
    last = given.atoms[-1]
    return Labelled(tuple(call.gives), (*given.atoms[:-1], None if last is None else np.tile(last, 4)))


def relative_position_bias(walk: ChannelPropagation, call: Call) -> Labelled:
    """A table (places, heads) -> (1, heads, places, places)."""
    table = call.args[0]
    walk.atoms.keep(table.atoms[0], f"{call.node.name} takes rows by their number")
    return Labelled(tuple(call.gives), (None, table.atoms[1], None, None))


RULES: dict[str, Rule] = {
    "shifted_window_attention": shifted_window_attention,
    "_patch_merging_pad": patch_merging,
    "_get_relative_position_bias": relative_position_bias,
}
