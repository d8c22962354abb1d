"""A method: a frozen, validated record of plain values, which is the recipe entry, and which can be attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from pydantic import ConfigDict
from torch import nn

from tersor.core.errors import InputError
from tersor.graph.layer_selection import weighted_layers
from tersor.pruning.mask import weight_mask
from tersor.training.attachment import Attachment, Chain
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import FrozenMaskedWeights, MaskedAttachment

PLAIN_VALUES = ConfigDict(extra="forbid")
"""The pydantic configuration of every method: `@dataclass(frozen=True, config=PLAIN_VALUES)`."""


@runtime_checkable
class Method(Protocol):
    """What every class in `methods/` is.

    Optional class variables: `needs_teacher`, `needs_steps`; `example`, parameters that show the method on a small
    network; `off`, parameters at which it changes nothing; `exempt`, the laws of `tests/laws` that it cannot pass, each
    with the reason.
    """

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Change the structure of `model`; draw no numbers from the global generator.

        Args:
            model: the network; its Parameter objects stay the same.
            context: data, teacher, number of steps, target, and what else a method may use.
        """
        ...


def chain(
    methods: Sequence[Method],
    model: nn.Module,
    context: AttachContext,
) -> Attachment:
    """Attaches `methods` one after the other, each on what the one before left, as one attachment. Under masks of
    earlier stages nothing moves.
    """
    parts: list[Attachment] = []
    with torch.random.fork_rng(devices=[]):
        for method in methods:
            before = {id(parameter): parameter.shape for parameter in model.parameters()}
            part = method.attach(model, context)
            model = part.model
            if any(parameter.shape != before.get(id(parameter), parameter.shape) for parameter in model.parameters()):
                _refuse_new_shapes(method, parts)
            if isinstance(part, MaskedAttachment):
                _refuse_masks(method, part, parts)
            parts.append(part)
    moved = {name for part in parts if isinstance(part, MaskedAttachment) for name in part.masked}
    layers = weighted_layers(model).items()
    still = {name: layer for name, layer in layers if weight_mask(layer) is not None and name not in moved}
    return Chain(model, [*parts, FrozenMaskedWeights(model, still)] if still else parts)


def _refuse_masks(method: Method, part: MaskedAttachment, parts: Sequence[Attachment]) -> None:
    """Each would undo what the other masks."""
    for other in parts:
        both = [name for name in part.masked if isinstance(other, MaskedAttachment) and name in other.masked]
        if both:
            raise InputError(
                f"{type(method).__name__} masks {both[0]}, which a method before it in the same stage masks too. Give "
                "them `layers` apart from each other, or stages of their own."
            )


def _refuse_new_shapes(method: Method, parts: Sequence[Attachment]) -> None:
    """What learns with layers, or moves weights by their places, was built for the shapes that they had."""
    for part in parts:
        if part.layers:
            paired = ", ".join(student for student, _ in part.layers)
            raise InputError(
                f"{type(method).__name__} changes shapes after {paired} were paired with the teacher's. Write it "
                "before the method that learns from these layers."
            )
        if part.holds_shapes:
            raise InputError(
                f"{type(method).__name__} changes shapes that another method of the stage goes by. Write it in a stage "
                "of its own behind."
            )
