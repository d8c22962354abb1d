"""A method: a frozen, validated record of plain values (its recipe entry) that can be attached to a network."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from pydantic import ConfigDict
from torch import nn

from tersor.core.errors import InputError
from tersor.core.user_code import user_code
from tersor.graph.feature_extraction import matching_paths
from tersor.graph.layer_selection import weighted_layers
from tersor.pruning.mask import weight_mask
from tersor.training.attachment import Attachment, Chain
from tersor.training.context import AttachContext, require_steps
from tersor.training.hook_names import misspelled_hooks
from tersor.training.layer_pairs import require_teacher
from tersor.training.mask_attachment import FrozenMaskedWeights, MaskedAttachment
from tersor.training.objective import check_terms, without_init, without_teacher

PLAIN_VALUES = ConfigDict(extra="forbid")
"""The pydantic configuration of every method: `@plain_dataclass(frozen=True, config=PLAIN_VALUES)`."""

_OF_ATTACHMENT = ("model", "terms", "label_weight", "notes", "layers")
"""What `Attachment.__init__` sets."""


@runtime_checkable
class Method(Protocol):
    """The protocol of every class in `methods/`.

    Optional class variables. `needs_teacher`, `needs_steps`: recipes and `chain` refuse the method without a teacher or
    without training. `needs_logits`, `needs_classes` (one target class for each position): tasks without them are
    refused. `example`: parameters for a small network. `off`: parameters at which the method changes nothing. `exempt`:
    the tests of `tests/laws` that it cannot pass, each with the reason.
    """

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Change the structure of `model`, without using the global random generator.

        Args:
            model: the network; its Parameter objects stay the same.
            context: data, teacher, number of steps, target and more.
        """
        ...


def chain(
    methods: Sequence[Method],
    model: nn.Module,
    context: AttachContext,
) -> Chain:
    """Attach `methods` in order, as one attachment; weights masked in earlier stages stay zero.

    Args:
        methods: tersor's or your own.
        model: the network.
        context: contains everything that the methods require.

    Raises:
        InputError: a method needs a teacher or steps that `context` does not have, cannot be combined with an earlier
            one, or raises an exception.
    """
    _check_form(methods)
    parts, names = list[Attachment](), list[str]()
    with torch.random.fork_rng(devices=[]):
        for method in methods:
            before = {id(parameter): parameter.shape for parameter in model.parameters()}
            part = _attached(method, model, context)
            model = part.model
            if any(parameter.shape != before.get(id(parameter), parameter.shape) for parameter in model.parameters()):
                _refuse_new_shapes(method, parts)
            if isinstance(part, MaskedAttachment):
                _refuse_masks(method, part, parts)
            parts.append(part)
            names.append(_name(method))
    check_terms([term for part in parts for term in part.terms])
    masked = {name for part in parts if isinstance(part, MaskedAttachment) for name in part.masked}
    layers = weighted_layers(model).items()
    frozen = {name: layer for name, layer in layers if weight_mask(layer) is not None and name not in masked}
    if frozen:
        parts.append(FrozenMaskedWeights(model, frozen))
        names.append("the masks of earlier stages")
    return Chain(model, parts, names)


def _check_form(methods: object) -> None:
    """Refuse what is not a list of methods."""
    if not isinstance(methods, list | tuple):
        raise InputError(f"chain was called with {_described(methods)}. Pass a list of methods: chain([...], ...).")
    for method in cast("Sequence[object]", methods):
        if isinstance(method, type) or not isinstance(method, Method):
            raise InputError(
                f"chain was called with {_described(method)} in the list. Pass instances of methods, such as "
                "SoftTargets()."
            )


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def _name(method: Method) -> str:
    return f"{type(method).__module__}:{type(method).__qualname__}"


def _attached(method: Method, model: nn.Module, context: AttachContext) -> Attachment:
    """Call `attach`.

    Raises:
        InputError: a user-defined method takes other arguments, raises an exception, or returns no Attachment; a
            required teacher, steps or layers are missing.
    """
    name = _name(method)
    rule = f"method '{name}': attach must take (model, context) and return an Attachment"
    if getattr(method, "needs_steps", False):
        require_steps(context, f"method '{name}'")
    if getattr(method, "needs_teacher", False):
        require_teacher(context.teacher, f"method '{name}'")
    try:
        inspect.signature(method.attach).bind(model, context)
    except TypeError as error:
        raise InputError(f"{rule}. Its arguments do not fit: {error}.") from error
    hint = without_teacher(name) if context.teacher is None else ""
    with user_code(f"method '{name}': attach", method, if_none=hint):
        part = cast("Any", method.attach(model, context))
    if not isinstance(part, Attachment):
        raise InputError(f"{rule}; it returns an object of type {type(part).__name__}.")
    if not all(hasattr(part, attribute) for attribute in _OF_ATTACHMENT):
        raise InputError(f"method '{name}': {without_init(part)}")
    check_terms(part.terms, f"method '{name}': ")
    for term in part.terms:
        term.of_method, term.had_teacher = name, context.teacher is not None
    part.notes = (*part.notes, *misspelled_hooks(part))
    for student, teacher in part.layers:
        matching_paths(part.model, [student], f"method '{name}' compares layers, but the student")
        if context.teacher is not None:
            matching_paths(context.teacher, [teacher], f"method '{name}' compares layers, but the teacher")
    return part


def _refuse_masks(method: Method, part: MaskedAttachment, parts: Sequence[Attachment]) -> None:
    """Refuse two methods that mask the same layer: each would overwrite the other's masks."""
    for other in parts:
        both = [name for name in part.masked if isinstance(other, MaskedAttachment) and name in other.masked]
        if both:
            raise InputError(
                f"{type(method).__name__} masks {both[0]}, which an earlier method of the same stage masks too. Give "
                "them different `layers`, or separate stages."
            )


def _refuse_new_shapes(method: Method, parts: Sequence[Attachment]) -> None:
    """Refuse shape changes after a method that was built for the earlier shapes."""
    for part in parts:
        if part.layers:
            paired = ", ".join(student for student, _ in part.layers)
            raise InputError(
                f"{type(method).__name__} changes shapes, but an earlier method of the stage has already paired layers "
                f"with those of the teacher: {paired}. Write {type(method).__name__} before it."
            )
        if part.holds_shapes:
            raise InputError(
                f"{type(method).__name__} changes shapes that another method of the stage depends on. Move "
                f"{type(method).__name__} to a separate, later stage."
            )
