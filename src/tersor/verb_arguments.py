"""Networks and loaders that were passed to a verb, checked against each other before any work is done."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tersor.core.batch_errors import wrong_labels
from tersor.core.errors import InputError
from tersor.core.evaluating import evaluating
from tersor.core.feeding import check_forward, described, only_tensors
from tersor.core.objective import Batch, images_of
from tersor.core.plain_network import plain_copy, refuse_what_is_no_network, refuse_without_weights, unwrapped
from tersor.loader import batches_of, given_labels


def to_compress(model: nn.Module, loader: Any, images: int) -> tuple[nn.Module, Iterable[Any]]:
    """A plain copy of the network, and the batches that it runs on, up to `images` images if they come only once.

    Raises:
        InputError: this is no network with weights, or it does not run on the images.
    """
    network = plain_copy(model)
    refuse_without_weights(network)
    batches, first = batches_of(loader, images)
    check_forward(type(network).__name__, network, first)
    return network, batches


def to_export(model: nn.Module, images: Tensor, name: str) -> nn.Module:
    """A plain copy of the network, which returns tensors for the images.

    Raises:
        InputError: this is no network, does not run on the images, or returns something else.
    """
    network = plain_copy(model, name)
    outputs = check_forward(name, network, images)
    if not only_tensors(outputs):
        raise InputError(f"{name} returns {described(outputs)}. Possible: tensors, also in tuples, lists and dicts.")
    return network


def student_of(model: nn.Module) -> nn.Module:
    """The student itself, out of its wrappers.

    Raises:
        InputError: it is no network that can be trained in float32.
    """
    refuse_what_is_no_network(model, "the student")
    student = unwrapped(model)
    refuse_without_weights(student, "the student")
    if not any(each.requires_grad for each in student.parameters()):
        raise InputError("every parameter of the student is frozen. Call student.requires_grad_(True) before.")
    other = {each.dtype for each in student.parameters() if each.is_floating_point()} - {torch.float32}
    if other:
        raise InputError(
            f"the student has weights of {other.pop()}, and is trained in place. Call student.float() before."
        )
    return student


def teacher_of(model: nn.Module) -> nn.Module:
    """The teacher itself, out of its wrappers; a copy in float32 where it has another precision.

    Raises:
        InputError: it is no network with weights.
    """
    refuse_what_is_no_network(model, "the teacher")
    teacher = unwrapped(model)
    refuse_without_weights(teacher, "the teacher")
    if any(each.is_floating_point() and each.dtype != torch.float32 for each in teacher.state_dict().values()):
        return copy.deepcopy(teacher).float()
    return teacher


def classes_of_both(student: nn.Module, teacher: nn.Module, images: Tensor) -> int:
    """How many classes both tell apart, by one dry forward of two images.

    Raises:
        InputError: one does not run on the images, or they do not return logits of the same classes.
    """
    outputs: list[Any] = []
    for name, network in (("the student", student), ("the teacher", teacher)):
        with evaluating(network):
            outputs.append(check_forward(name, network, images))
    shapes = [each.shape if isinstance(each, Tensor) else () for each in outputs]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise InputError(
            f"for two images the student returns {described(outputs[0])}, the teacher {described(outputs[1])}. Both "
            "need to return logits (2, classes), one tensor, of the same classes."
        )
    if shapes[0][1] < 2:
        raise InputError(
            "student and teacher return one logit for each image, which holds no distribution over classes to learn "
            "from. Give both two logits, one for each class."
        )
    return int(shapes[0][1])


def labelled(batches: Iterable[Any], classes: int, most: int) -> Iterator[Batch]:
    """The first `most` batches; with labels where they are class numbers."""
    for batch in islice(batches, most):
        images, labels = images_of(batch), given_labels(batch)
        usable = labels is not None and wrong_labels(labels, len(images), classes) is None
        yield Batch(images, labels.long() if labels is not None and usable else None)


def check_labels(network: nn.Module, batches: Iterable[Any], images: int) -> None:
    """Looks at the labels of the first `images` images.

    Raises:
        InputError: they are no class numbers of the network, or it does not return logits.
    """
    seen: list[tuple[Tensor, Tensor | None]] = []
    left = images
    for batch in batches:
        seen.append((images_of(batch), given_labels(batch)))
        left -= len(seen[-1][0])
        if left <= 0:
            break
    outputs = check_forward("the network", network, seen[0][0])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        raise InputError(
            f"for two images the network returns {described(outputs)}; the loss of the labels needs logits (2, "
            "classes). Write importance='magnitude', or return the logits alone, one for each class."
        )
    all_labels(seen, outputs.shape[1])


def all_labels(batches: Sequence[tuple[Tensor, Tensor | None]], classes: int) -> NDArray[Any] | None:
    """The labels (N,) of all batches; None if one batch has none.

    Raises:
        InputError: they are no numbers of these classes.
    """
    found: list[Tensor] = []
    least: int | None = None
    for images, labels in batches:
        if labels is None:
            return None
        error = wrong_labels(labels, len(images), classes, least)
        if error is not None:
            raise error
        if len(labels):
            least = min(int(labels.min()), int(labels.min()) if least is None else least)
        found.append(labels.cpu())
    return torch.cat(found).numpy() if found else np.empty(0, np.int64)
