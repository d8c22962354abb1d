"""A method: a frozen, validated record of plain values, which is the recipe entry, and which can be attached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import ConfigDict
from torch import nn

from tersor.core.errors import InputError
from tersor.core.progress import Tell, untold
from tersor.core.target import Target
from tersor.evaluation.latency_protocol import Stopwatch
from tersor.graph.layer_selection import weighted_layers
from tersor.pruning.mask import weight_mask
from tersor.training.attachment import Attachment, Chain
from tersor.training.mask_attachment import KeptMasks, MaskedAttachment

PLAIN_VALUES = ConfigDict(extra="forbid")
"""The pydantic configuration of every method: `@dataclass(frozen=True, config=PLAIN_VALUES)`."""


@runtime_checkable
class Method(Protocol):
    """What every class in `methods/` is.

    Class variables may say more: `needs_teacher`, `needs_steps`; `needs_stopwatch`, that `attach` takes one of
    `evaluation/latency_protocol.py` as well; `tells`, that it takes a `tell`, since attaching lasts; `example`,
    parameters that show what it does on a small network; `off`, those at which it changes nothing; `exempt`, the laws
    of `tests/laws` that it cannot keep, each with the reason.
    """

    def attach(
        self,
        model: nn.Module,
        *,
        data: Iterable[Any] | None = None,
        teacher: nn.Module | None = None,
        steps: int = 0,
        target: Target | None = None,
    ) -> Attachment:
        """Lays the method's structure on `model`; draws no numbers from the global generator.

        Args:
            model: the network; its Parameter objects stay the same.
            data: batches of images for methods that look at data: tensors (N, C, H, W), tuples that begin with
                one, or `Batch`es. It is iterated anew for every pass.
            teacher: the network to learn from.
            steps: optimizer steps that will follow.
            target: the runtime and processor that the network is made for; by default ONNX Runtime, here.
        """
        ...


def chain(
    methods: Sequence[Method],
    model: nn.Module,
    *,
    data: Iterable[Any] | None = None,
    teacher: nn.Module | None = None,
    steps: int = 0,
    target: Target | None = None,
    stopwatch: Stopwatch | None = None,
    tell: Tell = untold,
) -> Attachment:
    """Attaches `methods` one after the other, each on what the one before left, as one attachment. Under masks of
    earlier stages nothing moves.
    """
    parts: list[Attachment] = []
    with torch.random.fork_rng(devices=[]):
        for method in methods:
            before = {id(parameter): parameter.shape for parameter in model.parameters()}
            more: dict[str, Any] = {"stopwatch": stopwatch} if getattr(method, "needs_stopwatch", False) else {}
            more |= {"tell": tell} if getattr(method, "tells", False) else {}
            part = method.attach(model, data=data, teacher=teacher, steps=steps, target=target, **more)
            model = part.model
            if any(parameter.shape != before.get(id(parameter), parameter.shape) for parameter in model.parameters()):
                _refuse_new_shapes(method, parts)
            if isinstance(part, MaskedAttachment):
                _refuse_masks(method, part, parts)
            parts.append(part)
    moved = {name for part in parts if isinstance(part, MaskedAttachment) for name in part.masked}
    layers = weighted_layers(model).items()
    still = {name: layer for name, layer in layers if weight_mask(layer) is not None and name not in moved}
    return Chain(model, [*parts, KeptMasks(model, still)] if still else parts)


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
