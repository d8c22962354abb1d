"""Why a network cannot get as small as asked: the layers that cost most once all that may go is gone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import fx
from torch.nn.utils import parametrize

from tersor.graph.layer_selection import Layer, matching
from tersor.pruning.channel_groups import Cut

_REASONS = 4
_NAMED = 3


def shortfall(
    graph: fx.GraphModule,
    shares: Mapping[str, float],
    cuts: Sequence[Cut],
    whole: Mapping[str, str],
    exclude: Sequence[str],
) -> str:
    """What stays and what keeps it, the largest part first: `0.763 in rnn (no part of LSTM is removed), 0.016 in ...`.

    Args:
        graph: the network before anything goes.
        shares: layer -> what is left of it when all goes that may, as a fraction of the network as it was.
        cuts: of one channel of every group that may go.
        whole: root of a group of channels that stays -> why.
        exclude: patterns of layers whose channels stay.
    """
    held: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(shares, key=lambda name: -shares[name]):
        if shares[name] > 0:
            held[_reason(graph, name, cuts, whole, exclude)].append(name)
    parts = {reason: sum(shares[name] for name in names) for reason, names in held.items()}
    largest = sorted(parts, key=lambda reason: -parts[reason])[:_REASONS]
    return ", ".join(f"{parts[reason]:.3f} in {_listed(held[reason])} ({reason})" for reason in largest)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name or "products outside of layers" for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown}, ... ({len(names)} in all)"


def _reason(
    graph: fx.GraphModule, name: str, cuts: Sequence[Cut], whole: Mapping[str, str], exclude: Sequence[str]
) -> str:
    module = graph.get_submodule(name)
    kind = parametrize.type_before_parametrizations(module).__name__
    held = next((why for root, why in whole.items() if name and (root == name or root.startswith(f"{name}."))), None)
    if held is not None:
        return f"its output channels stay, since {held}"
    if exclude and name in matching(exclude, [each for each, _ in graph.named_modules() if each]):
        return "it is excluded"
    if any(cut.layer == name or cut.layer.startswith(f"{name}.") for cut in cuts):
        return "as narrow as `floor` and `round_to` allow"
    return "no rule follows its channels" if isinstance(module, Layer) else f"no part of {kind} is removed"
