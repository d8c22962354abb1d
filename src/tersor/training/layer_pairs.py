"""Which layer of a student learns from which of its teacher, and of what shapes they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data.batch import images_of
from tersor.graph.feature_extraction import last_feature_maps, map_size, matching_paths, shapes_of


@dataclass(frozen=True)
class Pair:
    """A layer of the student and one of the teacher, with the shapes of what they give, (N, C, H, W) or (N, L, C)."""

    student: str
    teacher: str
    student_shape: torch.Size
    teacher_shape: torch.Size

    @property
    def paths(self) -> tuple[str, str]:
        """As an Attachment asks for them."""
        return self.student, self.teacher

    @property
    def student_channels(self) -> int:
        """Of a feature map, or the width of a token."""
        return _channels(self.student_shape)

    @property
    def teacher_channels(self) -> int:
        """Of a feature map, or the width of a token."""
        return _channels(self.teacher_shape)

    @property
    def smaller(self) -> tuple[int, int]:
        """Height and width to which both maps are pooled."""
        ours, theirs = _size(self.student_shape), self.teacher_size
        return min(ours[0], theirs[0]), min(ours[1], theirs[1])

    @property
    def teacher_size(self) -> tuple[int, int]:
        """Height and width of the teacher's map."""
        return _size(self.teacher_shape)


def _channels(shape: torch.Size) -> int:
    return shape[1] if len(shape) == 4 else shape[2]


def _size(shape: torch.Size) -> tuple[int, int]:
    size = map_size(shape)
    assert size is not None
    return size


def require_teacher(teacher: nn.Module | None, method: str) -> nn.Module:
    """The teacher.

    Raises:
        InputError: there is none.
    """
    if teacher is None:
        raise InputError(f"{method} needs a teacher; none was given. Pass teacher=..., or write one in the recipe.")
    return teacher


def pairs_of(
    student: nn.Module,
    teacher: nn.Module | None,
    layers: Sequence[str],
    teacher_layers: Sequence[str],
    data: Iterable[Any] | None,
    *,
    method: str,
    chosen: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda found: found,
) -> list[Pair]:
    """The pairs that are meant, seen in one dry forward of each network.

    Args:
        student: the network that learns.
        teacher: the one that it learns from.
        layers: patterns of the student's; where there are none, the last layer at each resolution of either network.
        teacher_layers: patterns of the teacher's; the same as the student's where there are none.
        data: batches of images, the first of which is shown.
        method: how errors call who asks.
        chosen: which of the layers that were found by themselves are taken.

    Raises:
        InputError: no teacher, no images, a pattern that matches nothing, not as many of one network as of the other,
            a layer that gives no feature map.
    """
    teacher = require_teacher(teacher, method)
    if teacher_layers and not layers:
        raise InputError(f"{method} has teacher_layers and no layers. Write both, or neither.")
    images = _example(data, method)
    if layers:
        of_student = matching_paths(student, layers, "the student")
        of_teacher = matching_paths(teacher, teacher_layers or layers, "the teacher")
        if len(of_student) != len(of_teacher):
            raise InputError(
                f"{method} pairs layers one by one, and has {len(of_student)} of the student ({', '.join(of_student)}) "
                f"and {len(of_teacher)} of the teacher ({', '.join(of_teacher)}). Write as many of one as of the other."
            )
    else:
        ours, theirs = last_feature_maps(student, images), last_feature_maps(teacher, images)
        count = min(len(ours), len(theirs))  # the last ones: a deeper network has more resolutions before them
        of_student, of_teacher = chosen(ours[-count:]), chosen(theirs[-count:])
    shapes, shapes_of_teacher = shapes_of(student, of_student, images), shapes_of(teacher, of_teacher, images)
    for whose, found in (("student", shapes), ("teacher", shapes_of_teacher)):
        for path, shape in found.items():
            if map_size(shape) is None:
                raise InputError(
                    f"the {whose}'s layer {path} gives {tuple(shape)}. Possible: feature maps (N, C, H, W), tokens "
                    "(N, L, C) that lie in a square."
                )
    return [
        Pair(ours, theirs, shapes[ours], shapes_of_teacher[theirs])
        for ours, theirs in dict.fromkeys(zip(of_student, of_teacher, strict=True))
    ]


def pair_of(
    student: nn.Module,
    teacher: nn.Module | None,
    layer: str,
    teacher_layer: str,
    data: Iterable[Any] | None,
    *,
    method: str,
) -> Pair:
    """The one pair that is meant; the last feature map of either network where nothing is written.

    Raises:
        InputError: as `pairs_of`; a pattern that matches several layers.
    """
    teacher = require_teacher(teacher, method)
    if teacher_layer and not layer:
        raise InputError(f"{method} has teacher_layer and no layer. Write both, or neither.")
    for whose, network, pattern in (("student", student, layer), ("teacher", teacher, teacher_layer or layer)):
        found = matching_paths(network, [pattern], f"the {whose}") if pattern else ()
        if len(found) > 1:
            raise InputError(
                f"{method} takes one layer, and '{pattern}' is {len(found)} of the {whose}: {', '.join(found)}. Write "
                "one of them."
            )
    layers, of_teacher = ((name,) if name else () for name in (layer, teacher_layer))
    (pair,) = pairs_of(student, teacher, layers, of_teacher, data, method=method, chosen=last)
    return pair


def _example(data: Iterable[Any] | None, method: str) -> Tensor:
    first = None if data is None else next(iter(data), None)
    if first is None:
        raise InputError(f"{method} needs images to see the layers' shapes on; none were given. Pass data=...")
    return images_of(first)[:2]


def last(found: tuple[str, ...]) -> tuple[str, ...]:
    """The last of the layers that were found."""
    return found[-1:]
