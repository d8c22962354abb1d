"""Which tensors of a checkpoint are the network's: several may lie in one file, under prefixes and under norms.

A training loop saves the network beside its running mean (EMA), its loss and its teacher; DataParallel, `torch.compile`
and Lightning put `module.`, `_orig_mod.` or `model.` before every key; weight_norm, spectral_norm and
`torch.nn.utils.prune` save what a weight is computed from. The keys and shapes of the network decide which are meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.models.weights_folding import folded
from tersor.models.weights_mismatch import is_counter, mismatch

Tensors = dict[str, Tensor]
Place = tuple[str, str]
"""The keys that lead to a dict of tensors, as Python writes them; and the prefix of the keys there."""

_WRAPPERS = {"module", "_orig_mod"}
_DEEPEST = 3
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def state_dicts(content: Mapping[Any, Any], place: str = "", depth: int = 0) -> Iterator[tuple[str, Tensors]]:
    """Every dict with tensors in a checkpoint, by the keys that lead to it."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(key, str) and depth < _DEEPEST and not key.startswith("optim"):
            inner = cast("Mapping[Any, Any]", value)
            yield from state_dicts(inner, f"{place}[{key!r}]", depth + 1)


def chosen(path: str, found: Mapping[str, Tensors], model: nn.Module) -> tuple[Tensors, str]:
    """The tensors of the network, with its keys; and from where, if there was a choice.

    Args:
        path: of the file.
        found: the `state_dicts` in it.
        model: the network.

    Raises:
        InputError: none of them is of this network, or several are and differ.
    """
    expected = model.state_dict()
    closest: tuple[int, Tensors] = (-1, {})
    transposed = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, _TRANSPOSED)]
    variants: tuple[Callable[[Tensors], Tensors], ...] = (
        lambda tensors: tensors,
        _without_wrappers,
        lambda tensors: folded(_without_wrappers(tensors), transposed),
    )
    for variant in variants:
        fits: dict[Place, Tensors] = {}
        rest = dict[Place, int]()
        for place, tensors in found.items():
            plain = variant(tensors)
            for prefix, placed in _placed(plain, expected):
                shared = sum(key in placed and placed[key].shape == value.shape for key, value in expected.items())
                closest = max(closest, (shared, placed), key=lambda each: each[0])
                if mismatch(path, placed, expected) is None:
                    fits[place, prefix] = placed
                    rest[place, prefix] = len(plain) - len(placed)
        different = _different(fits)
        if len(different) > 1:
            raise _several(path, list(different))
        if different:
            place, tensors = next(iter(different.items()))
            return tensors, _shown(*place) if len(found) > 1 or rest[place] else ""
    error = mismatch(path, closest[1] or next(iter(found.values())), expected)
    assert error is not None
    raise error


def _several(path: str, places: Sequence[Place]) -> InputError:
    place, prefix = places[-1]
    one = f"checkpoint{place}"
    if prefix:
        one = f"{{key: value for key, value in {one}.items() if key.startswith({prefix!r})}}"
    return InputError(
        f"'{path}' holds several sets of weights of this network: {', '.join(_shown(*each) for each in places)}. Save "
        f"the one that is meant alone: checkpoint = torch.load('{path}'); torch.save({one}, 'weights.pt')."
    )


def _shown(place: str, prefix: str) -> str:
    return f"checkpoint{place}" + (f" under {prefix!r}" if prefix else "")


def _different(fits: Mapping[Place, Tensors]) -> dict[Place, Tensors]:
    """Those that are not equal to one before."""
    kept: dict[Place, Tensors] = {}
    for place, tensors in fits.items():
        if not any(_equal(tensors, other) for other in kept.values()):
            kept[place] = tensors
    return kept


def _equal(first: Tensors, second: Tensors) -> bool:
    keys = [key for key in first if not is_counter(key)]
    return all(key in second and torch.equal(first[key], second[key]) for key in keys)


def _without_wrappers(tensors: Tensors) -> Tensors:
    return {".".join(part for part in key.split(".") if part not in _WRAPPERS): each for key, each in tensors.items()}


def _placed(tensors: Tensors, expected: Mapping[str, Any]) -> Iterator[tuple[str, Tensors]]:
    """The tensors by the network's keys, for every prefix that either side may have."""
    keys = [key for key in expected if not is_counter(key)]
    yield "", tensors
    if not keys:
        return
    ends = dict.fromkeys((keys[0], keys[-1]))
    prefixes = dict.fromkeys(key[: -len(end)] for end in ends for key in tensors if key.endswith(f".{end}"))
    for prefix in prefixes:
        yield prefix, {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
    ends = dict.fromkeys((next(iter(tensors)), next(reversed(tensors))))
    lacking = dict.fromkeys(key[: -len(end)] for end in ends for key in keys if key.endswith(f".{end}"))
    for prefix in lacking:
        yield "", {prefix + key: each for key, each in tensors.items()}
