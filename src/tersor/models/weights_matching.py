"""Select the tensors of a checkpoint that belong to a network, or explain what differs.

Training loops save a network beside its exponential moving average (EMA), its loss and its teacher. DataParallel,
`torch.compile` and Lightning prefix keys with `module.`, `_orig_mod.` or `model.`; weight_norm, spectral_norm and
`torch.nn.utils.prune` save what a weight is computed from. The keys and shapes of the network determine which
tensors are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.models.cifar_resnet import DEPTHS, CifarResNet
from tersor.models.weights_folding import fold

Tensors = dict[str, Tensor]
Location = tuple[str, str]
"""The keys of the dict of tensors in the checkpoint, in Python syntax; and the prefix of the keys in it."""

_WRAPPERS = {"module", "_orig_mod"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SHOWN = 4


class OtherClasses(InputError):  # noqa: N818 - names the difference, not an error
    """The file holds weights of the same network, but for `in_file` classes, not the number that this network has."""

    def __init__(self, path: str, in_file: int, here: int) -> None:
        super().__init__(
            f"'{path}': the file has weights for {in_file} classes, but the network was built for {here} (num_classes, "
            f"or the number of classes in the data). Give weights for {here} classes, or data with {in_file} classes. "
            f"In Python, build the network with num_classes={in_file}."
        )
        self.in_file = in_file


def is_counter(key: str) -> bool:
    """Whether `key` is BatchNorm's count of batches, which old files lack."""
    return key.endswith("num_batches_tracked")


def match(path: str, state_dicts: Mapping[str, Tensors], model: nn.Module) -> tuple[Tensors, str]:
    """Return the tensors of `model` by its keys, and their location in the file if there was a choice.

    Args:
        path: path of the file.
        state_dicts: every dict of tensors in the file, by location.
        model: the network.

    Raises:
        InputError: no dict fits the network, or several do and differ.
    """
    expected = model.state_dict()
    closest: tuple[int, Tensors] = (-1, {})
    transposed = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, _TRANSPOSED)]
    variants: tuple[Callable[[Tensors], Tensors], ...] = (
        lambda tensors: tensors,
        _without_wrappers,
        lambda tensors: fold(_without_wrappers(tensors), transposed),
    )
    for variant in variants:
        matches: dict[Location, Tensors] = {}
        unused = dict[Location, int]()
        for place, tensors in state_dicts.items():
            plain = variant(tensors)
            for prefix, candidate in _by_prefix(plain, expected):
                shared = sum(
                    key in candidate and candidate[key].shape == value.shape for key, value in expected.items()
                )
                closest = max(closest, (shared, candidate), key=lambda each: each[0])
                if mismatch(path, candidate, expected) is None:
                    matches[place, prefix] = candidate
                    unused[place, prefix] = len(plain) - len(candidate)
        distinct = _distinct(matches)
        if len(distinct) > 1:
            raise _ambiguous(path, list(distinct))
        if distinct:
            location, tensors = next(iter(distinct.items()))
            return tensors, _described(*location) if len(state_dicts) > 1 or unused[location] else ""
    error = mismatch(path, closest[1] or next(iter(state_dicts.values())), expected)
    assert error is not None
    raise error


def _ambiguous(path: str, locations: Sequence[Location]) -> InputError:
    place, prefix = locations[-1]
    one = f"checkpoint{place}"
    if prefix:
        one = f"{{key: value for key, value in {one}.items() if key.startswith({prefix!r})}}"
    return InputError(
        f"'{path}' holds several sets of weights of this network: {', '.join(_described(*each) for each in locations)}."
        f" Save one of them alone: checkpoint = torch.load('{path}'); torch.save({one}, 'weights.pt')."
    )


def _described(place: str, prefix: str) -> str:
    return f"checkpoint{place}" + (f" under {prefix!r}" if prefix else "")


def _distinct(matches: Mapping[Location, Tensors]) -> dict[Location, Tensors]:
    """The matches without those that equal an earlier one."""
    distinct: dict[Location, Tensors] = {}
    for location, tensors in matches.items():
        if not any(_equal(tensors, other) for other in distinct.values()):
            distinct[location] = tensors
    return distinct


def _equal(first: Tensors, second: Tensors) -> bool:
    keys = [key for key in first if not is_counter(key)]
    return all(key in second and torch.equal(first[key], second[key]) for key in keys)


def _without_wrappers(tensors: Tensors) -> Tensors:
    return {".".join(part for part in key.split(".") if part not in _WRAPPERS): each for key, each in tensors.items()}


def _by_prefix(tensors: Tensors, expected: Mapping[str, Any]) -> Iterator[tuple[str, Tensors]]:
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
    missing = dict.fromkeys(key[: -len(end)] for end in ends for key in keys if key.endswith(f".{end}"))
    for prefix in missing:
        yield "", {prefix + key: each for key, each in tensors.items()}


def mismatch(path: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Any]) -> InputError | None:
    """Return the error if `tensors` do not fit the network whose `state_dict` is `expected`."""
    missing = [key for key in expected if key not in tensors and not is_counter(key)]
    unexpected = [key for key in tensors if key not in expected]
    reshaped = [key for key in expected if key in tensors and tensors[key].shape != expected[key].shape]
    if not (missing or unexpected or reshaped):
        return None
    if not (missing or unexpected):
        classes = _classes(reshaped, tensors, expected)
        if classes is not None:
            return OtherClasses(path, *classes)
    shapes = [f"{key} ({_shape(tensors[key])} in the file, {_shape(expected[key])} here)" for key in reshaped]
    parts = [
        f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}."
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    advice = _cifar_resnet_of(tensors) if missing or unexpected else ""
    if any("parametrizations." in key for key in unexpected):
        advice = " Before saving, call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
    return InputError(f"'{path}' holds the weights of another network. {' '.join(parts)}{advice}")


def _classes(
    reshaped: Iterable[str], tensors: Mapping[str, Tensor], expected: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Number of classes in the file and in the network, if only the number of outputs of the last layer differs."""
    last = [*expected][-1].rpartition(".")[0]
    for key in reshaped:
        if key.rpartition(".")[0] != last or tensors[key].shape[1:] != expected[key].shape[1:]:
            return None
    return len(tensors[f"{last}.weight"]), len(expected[f"{last}.weight"])


def _shape(tensor: Tensor) -> str:
    return "x".join(str(length) for length in tensor.shape) or "a number"


def _cifar_resnet_of(tensors: Mapping[str, Tensor]) -> str:
    """Names the CIFAR ResNet that the tensors fit; empty if there is none."""
    keys = {key for key in tensors if not is_counter(key)}
    if "linear.weight" not in keys:
        return ""
    for depth in DEPTHS:
        if keys == _keys(depth):
            classes = len(tensors["linear.weight"])
            return f" The file fits resnet{depth} with num_classes: {classes}."
    return ""


@cache
def _keys(depth: int) -> set[str]:
    """Keys of the CIFAR ResNet of a depth; building all of them takes seconds."""
    with torch.device("meta"):
        return {key for key in CifarResNet(depth).state_dict() if not is_counter(key)}
