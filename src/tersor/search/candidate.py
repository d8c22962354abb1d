"""A candidate: one choice of network, depth, width, bits and resolution, and its recipe."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tersor.methods.mixed_precision import MixedPrecision
from tersor.methods.ptq import PTQ
from tersor.recipe import Stage

ORIGINAL = "original"
QUANTIZE = "quantize"
BITS = ("8", "4", "mixed")
_IMAGES = 128
"""Images on which residual branches are compared: half of the default, since every candidate compares them again."""
MIXED_BITS = 5.0
"""Average bits of a weight under mixed precision."""


@dataclass(frozen=True)
class Removal:
    """What is removed in one step: residual branches, then channels.

    Attributes:
        branches: residual branches that are removed.
        keep_macs: fraction of the MACs that is kept.
    """

    branches: int = 0
    keep_macs: float = 1.0

    def stages(self, name: str) -> tuple[Stage, ...]:
        """The stage of this name that removes them; none if nothing is removed."""
        if not self.branches and self.keep_macs == 1:
            return ()
        options: dict[str, Any] = {"keep_macs": self.keep_macs, "branches": self.branches}
        if self.keep_macs < 1:
            options |= {"importance": "obs", "scope": "global"}
        else:
            options["importance_images"] = _IMAGES
        return (Stage(name=name, methods=({"channel_pruning": options},)),)

    def __str__(self) -> str:
        if self.branches:
            return f"{self.branches} more branch{'es' if self.branches > 1 else ''} removed"
        return f"pruned to at most {100 * self.keep_macs:.0f} % of the remaining MACs"


@dataclass(frozen=True)
class Candidate:
    """A network to try.

    Attributes:
        network: `original`, or the name of a student.
        branches: residual branches that are removed.
        keep_macs: fraction of the MACs that is kept.
        bits: bits of the weights: "8", "4" or "mixed".
        pixels: height and width of the images; None for those of the data.
        later: what is removed after some training; each removal is followed by more training.
    """

    network: str = ORIGINAL
    branches: int = 0
    keep_macs: float = 1.0
    bits: str = "8"
    pixels: int | None = None
    later: tuple[Removal, ...] = ()

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Candidate:
        """The candidate with these `parameters`."""
        fields: dict[str, Any] = {**parameters}
        fields["later"] = tuple(Removal(**each) for each in parameters.get("later", ()))
        return cls(**fields)

    @property
    def parent(self) -> Candidate:
        """The candidate before its last later removal; a candidate without one is its own parent."""
        return replace(self, later=self.later[:-1])

    @property
    def inherits(self) -> bool:
        """Whether it starts from the original's weights."""
        return self.network == ORIGINAL

    @property
    def name(self) -> str:
        """A name for files and tables, different for different candidates."""
        parts = [re.sub(r"[^A-Za-z0-9_]+", "_", self.network.rpartition("/")[2])[:40]]
        if parts[0] != self.network:
            parts.append(hashlib.sha256(self.network.encode()).hexdigest()[:6])
        parts += [f"branches{self.branches}"] if self.branches else []
        parts += [f"macs{100 * self.keep_macs:.0f}"] if self.keep_macs < 1 else []
        parts += [f"{self.pixels}px"] if self.pixels else []
        parts += [f"then-branches{each.branches}" if each.branches else f"then-macs{100 * each.keep_macs:.0f}"
                  for each in self.later]  # fmt: skip
        return "-".join([*parts, f"{self.bits}bit"])

    def trained(self, steps: int) -> str:
        """The name of its network after a total of `steps` training steps."""
        return f"{self.name}-{steps}steps"

    def __str__(self) -> str:
        parts = [self.network]
        parts += [f"{self.branches} branch{'es' if self.branches > 1 else ''} removed"] if self.branches else []
        parts += [f"pruned to at most {100 * self.keep_macs:.0f} % of the MACs"] if self.keep_macs < 1 else []
        parts += [f"{self.pixels} pixels"] if self.pixels else []
        parts += [f"{each} after training" for each in self.later]
        return ", ".join([*parts, "mixed bits" if self.bits == "mixed" else f"{self.bits} bits"])

    @property
    def given(self) -> str:
        """What the user wrote for this candidate: the name of a student, or a resolution of the original."""
        return f"{self.pixels} pixels" if self.pixels else self.network

    @property
    def family(self) -> str:
        """The kind of change, by which a report groups candidates."""
        if not self.inherits:
            return "student networks"
        removals = (self.first, *self.later)
        changes = {
            "branches": any(each.branches for each in removals),
            "channels": any(each.keep_macs < 1 for each in removals),
            "pixels": bool(self.pixels),
        }
        fewer = [name for name, changed in changes.items() if changed] or ["bits"]
        return f"fewer {' and '.join(fewer)}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Its fields, as plain values."""
        return {**asdict(self), "later": [asdict(each) for each in self.later]}

    @property
    def first(self) -> Removal:
        """What is removed before any training."""
        return Removal(self.branches, self.keep_macs)

    @property
    def removal(self) -> tuple[Stage, ...]:
        """The stage that removes branches and channels before any training; none if nothing is removed."""
        return self.first.stages("prune")

    @property
    def last_removal(self) -> tuple[Stage, ...]:
        """The stage of the last later removal."""
        return self.later[-1].stages(f"prune-{len(self.later) + 1}")

    @property
    def rounding(self) -> Stage:
        """The stage that quantizes after training."""
        methods: dict[str, Any] = {"8": PTQ(), "4": PTQ(bits=4), "mixed": MixedPrecision(average_bits=MIXED_BITS)}
        return Stage(name=QUANTIZE, methods=(methods[self.bits],))

    def stages(self, trained: Sequence[Stage]) -> tuple[Stage, ...]:
        """All stages, including the training stages. The last training stage may already quantize."""
        quantized = any(stage.name == QUANTIZE for stage in trained)
        return (*self.removal, *trained, *(() if quantized else (self.rounding,)))
