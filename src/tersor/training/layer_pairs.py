"""Pairs of student and teacher layers that a distillation loss compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.data.batch import images_of
from tersor.data.network_inputs import NetworkInput
from tersor.graph.feature_extraction import last_feature_maps, map_size, matching_paths, shapes_of


@dataclass(frozen=True)
class LayerPair:
    """Paths of a student layer and a teacher layer, with their output shapes, (N, C, H, W) or (N, L, C)."""

    student: str
    teacher: str
    student_shape: torch.Size
    teacher_shape: torch.Size

    @property
    def paths(self) -> tuple[str, str]:
        """The student's and the teacher's path."""
        return self.student, self.teacher

    @property
    def student_channels(self) -> int:
        """Channels of the student's feature map, or width of its tokens."""
        return _channels(self.student_shape)

    @property
    def teacher_channels(self) -> int:
        """Channels of the teacher's feature map, or width of its tokens."""
        return _channels(self.teacher_shape)

    @property
    def common_size(self) -> tuple[int, int]:
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
        raise InputError(
            f"{method} needs a teacher; none was given. Pass AttachContext(teacher=...), or write a teacher in the "
            "recipe."
        )
    return teacher


def match_layers(
    student: nn.Module,
    teacher: nn.Module | None,
    layers: Sequence[str],
    teacher_layers: Sequence[str],
    data: Iterable[Any] | None,
    *,
    method: str,
    select: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda paths: paths,
) -> list[LayerPair]:
    """Pair the layers of student and teacher; shapes come from one forward pass of each.

    Args:
        student: the student.
        teacher: the teacher.
        layers: patterns of student layers; by default the last layer at each resolution of both networks.
        teacher_layers: patterns of teacher layers; by default those of the student.
        data: batches of images, of which the first is used.
        method: the method's name, for error messages.
        select: selects from the default layers of each network.

    Raises:
        InputError: no teacher, no images, a pattern without a match, different numbers of layers, a layer whose output
            is not a feature map.
    """
    teacher = require_teacher(teacher, method)
    if teacher_layers and not layers:
        raise InputError(f"{method} has teacher_layers but no layers. Write layers, too, or leave out teacher_layers.")
    images = _example_images(data, method)
    if layers:
        student_paths = matching_paths(student, layers, "the student")
        teacher_paths = matching_paths(teacher, teacher_layers or layers, "the teacher")
        if len(student_paths) != len(teacher_paths):
            raise InputError(
                f"{method} pairs layers one to one, but the patterns match different numbers of layers: "
                f"{len(student_paths)} of the student ({', '.join(student_paths)}) and {len(teacher_paths)} of the "
                f"teacher ({', '.join(teacher_paths)}). Write patterns that match the same number of layers."
            )
    else:
        ours, theirs = last_feature_maps(student, images), last_feature_maps(teacher, images)
        count = min(len(ours), len(theirs))  # the last ones: a deeper network has more resolutions before them
        student_paths, teacher_paths = select(ours[-count:]), select(theirs[-count:])
    student_shapes, teacher_shapes = (
        shapes_of(student, student_paths, images),
        shapes_of(teacher, teacher_paths, images),
    )
    for network, shapes in (("student", student_shapes), ("teacher", teacher_shapes)):
        for path, shape in shapes.items():
            if map_size(shape) is None:
                raise InputError(
                    f"the output of the {network}'s layer {path} has shape {tuple(shape)}. Possible: feature maps "
                    "(N, C, H, W), or tokens (N, L, C) that form a square."
                )
    return [
        LayerPair(ours, theirs, student_shapes[ours], teacher_shapes[theirs])
        for ours, theirs in dict.fromkeys(zip(student_paths, teacher_paths, strict=True))
    ]


def match_layer(
    student: nn.Module,
    teacher: nn.Module | None,
    layer: str,
    teacher_layer: str,
    data: Iterable[Any] | None,
    *,
    method: str,
) -> LayerPair:
    """Pair one layer of each network, by default the last feature map.

    Raises:
        InputError: as `match_layers`; a pattern that matches several layers.
    """
    teacher = require_teacher(teacher, method)
    if teacher_layer and not layer:
        raise InputError(f"{method} has teacher_layer but no layer. Write layer, too, or leave out teacher_layer.")
    for name, network, pattern in (("student", student, layer), ("teacher", teacher, teacher_layer or layer)):
        paths = matching_paths(network, [pattern], f"the {name}") if pattern else ()
        if len(paths) > 1:
            raise InputError(
                f"{method} takes one layer, and '{pattern}' matches {len(paths)} of the {name}: {', '.join(paths)}. "
                "Write one of them."
            )
    student_layers, teacher_layers = ((name,) if name else () for name in (layer, teacher_layer))
    (pair,) = match_layers(student, teacher, student_layers, teacher_layers, data, method=method, select=last_path)
    return pair


def _example_images(data: Iterable[Any] | None, method: str) -> NetworkInput:
    first = None if data is None else next(iter(data), None)
    if first is None:
        raise InputError(
            f"{method} needs images to determine layer shapes; none were given. Pass AttachContext(data=...)."
        )
    return images_of(first)[:2]


def last_path(paths: tuple[str, ...]) -> tuple[str, ...]:
    """The last of some paths."""
    return paths[-1:]
