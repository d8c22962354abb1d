"""The candidates: the original with other depth, width, bits or resolution, students, and tersor's `wide_plain_*`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from tersor.models.wide_plain import WIDTHS
from tersor.search.candidate import BITS, ORIGINAL, Candidate

_LARGE_IMAGE = 64
"""Image size from which the `wide_plain` networks have the large stem."""
SMALLEST_IMAGE = 8
"""Smallest height and width of the images, in pixels."""
_DEPTHS = (0.34, 0.5, 0.67)
_MORE_DEPTHS = (0.42, 0.59)
_KEPT = (0.5, 0.25)
_LEAST_KEPT, _STEP = 0.1, 0.05
_FIRST_WIDTHS = (48, 32, 64)


def family(pixels: int) -> list[str]:
    """Names of the `wide_plain` networks for images of this height and width, in the order in which they are tried."""
    if pixels < SMALLEST_IMAGE:
        return []
    stem = "wide_plain_large" if pixels >= _LARGE_IMAGE else "wide_plain"
    widths = [*_FIRST_WIDTHS, *(width for width in WIDTHS if width not in _FIRST_WIDTHS)]
    return [f"{stem}_{width}" for width in widths]


@dataclass(frozen=True)
class Space:
    """What is tried.

    Attributes:
        branches: number of residual branches that can be removed; 0 for none.
        prunable: whether channels can be removed.
        students: names of the networks that replace the original.
        bits: bits of the weights: 8, and fewer if the size is limited.
        pixels: further resolutions.
    """

    branches: int
    prunable: bool
    students: Sequence[str]
    bits: Sequence[str] = ("8",)
    pixels: Sequence[int] = ()

    def first(self) -> list[Candidate]:
        """The candidates that are tried first: changes of the original and students in turn, then combined changes."""
        depths = sorted({int(share * self.branches) for share in _DEPTHS} - {0})
        more = sorted({int(share * self.branches) for share in _MORE_DEPTHS} - {0, *depths})
        kept = _KEPT if self.prunable else ()
        single = [Candidate(branches=depth) for depth in depths] + [Candidate(keep_macs=keep) for keep in kept[:1]]
        single += [Candidate(branches=depth) for depth in more] + [Candidate(keep_macs=keep) for keep in kept[1:]]
        products = [Candidate(branches=depth, keep_macs=keep) for depth in depths for keep in kept]
        students = [Candidate(name) for name in self.students]
        ordered = [*_in_turn(single, students), *products]
        ordered += [Candidate(each.network, each.branches, each.keep_macs, "8", size)
                    for size in self.pixels for each in [Candidate(), *students[:2]]]  # fmt: skip
        fewer = [bits for bits in self.bits if bits != "8"]
        return [*ordered, *(Candidate(bits=bits) for bits in fewer)]

    def distributions(self) -> dict[str, BaseDistribution]:
        """The ranges of the parameters that change the original, for an Optuna sampler."""
        least = _LEAST_KEPT if self.prunable else 1.0
        bits: dict[str, BaseDistribution] = {"bits": CategoricalDistribution(BITS)} if len(self.bits) > 1 else {}
        return {
            "branches": IntDistribution(0, self.branches),
            "keep_macs": FloatDistribution(least, 1.0, step=_STEP if self.prunable else None),
            **bits,
        }

    @property
    def samples(self) -> bool:
        """Whether there is more to try than `first`."""
        return self.prunable or self.branches > 0


def candidate_of(parameters: Mapping[str, Any]) -> Candidate:
    """The candidate of sampled parameters, which describe a change of the original."""
    return Candidate(
        ORIGINAL,
        int(parameters["branches"]),
        round(float(parameters["keep_macs"]), 2),
        str(parameters.get("bits", BITS[0])),
    )


def _in_turn(first: Sequence[Candidate], second: Sequence[Candidate]) -> list[Candidate]:
    """One of each in turn, then the rest of the longer sequence."""
    shared = min(len(first), len(second))
    pairs = [each for pair in zip(first, second, strict=False) for each in pair]
    return [*pairs, *first[shared:], *second[shared:]]
