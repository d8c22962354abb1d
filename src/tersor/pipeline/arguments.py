"""Arguments of the Python functions: networks, loaders, paths and names, checked before any work starts."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersor.core.errors import CompressionWarning, InputError
from tersor.core.inputs import Inputs
from tersor.data.batch import images_of
from tersor.data.loader import batches_of
from tersor.data.network_inputs import NetworkInput
from tersor.evaluation.session import Session
from tersor.evaluation.verification import Normalization
from tersor.graph.eval_mode import check_forward, only_tensors
from tersor.graph.plain_network import plain_copy, refuse_without_weights, require_network, unwrapped
from tersor.pipeline.normalization import check_normalization
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.qdq_placement import RUNTIME
from tersor.tasks.network_outputs import described


def to_compress(model: nn.Module, loader: Any, images: int) -> tuple[nn.Module, Iterable[Any], NetworkInput]:
    """A plain copy of the network, the batches and their first images.

    Up to `images` images of a one-shot iterator are kept.

    Raises:
        InputError: not a network with weights, or its forward pass fails on the images.
    """
    network = plain_copy(model)
    refuse_without_weights(network)
    batches, first = batches_of(loader, images)
    check_forward(type(network).__name__, network, first)
    return network, batches, first


def warn_of_another_runtime(model: object, runtime: str) -> None:
    """Warn if the network was quantized for a runtime other than the one it is exported for; called by `export`."""
    before = model.meta.get(RUNTIME, runtime) if isinstance(model, fx.GraphModule) else runtime
    if before != runtime:
        warnings.warn(
            f"the network was quantized for {before} and is exported for {runtime}, where fewer operators may be "
            f"computed in integers. Pass runtime='{runtime}' to tersor.quantize, too.",
            CompressionWarning,
            stacklevel=3,
        )


def refuse_quantized(model: object) -> None:
    """Check that a network has no quantizers yet; called by `quantize`.

    Raises:
        InputError: it has some.
    """
    if isinstance(model, nn.Module) and any(isinstance(each, FakeQuantize) for each in model.modules()):
        raise InputError(
            "the network is already quantized. Pass it to tersor.export. To use other arguments, quantize the original "
            "float network."
        )


def to_export(model: nn.Module, images: NetworkInput, name: str) -> nn.Module:
    """A plain copy of a network whose outputs are tensors.

    Raises:
        InputError: not a network, its forward pass fails on the images, or its outputs are not tensors.
    """
    network = plain_copy(model, name)
    outputs = check_forward(name, network, images)
    if not only_tensors(outputs):
        possible = "tensors, also in tuples, lists, dicts and dataclasses"
        raise InputError(f"{name} returns {described(outputs)}. Possible: {possible}.")
    return network


def student_of(model: nn.Module) -> nn.Module:
    """The student without wrappers such as DataParallel.

    Raises:
        InputError: not a network that can be trained in float32.
    """
    require_network(model, "the student")
    student = unwrapped(model)
    refuse_without_weights(student, "the student")
    if not any(each.requires_grad for each in student.parameters()):
        raise InputError("every parameter of the student is frozen. Call student.requires_grad_(True) first.")
    other = {each.dtype for each in student.parameters() if each.is_floating_point()} - {torch.float32}
    if other:
        raise InputError(
            f"the student has weights of type {other.pop()}, but training needs float32. Call student.float() first."
        )
    return student


def teacher_of(model: nn.Module) -> nn.Module:
    """The teacher without wrappers, as a float32 copy if it has another precision.

    Raises:
        InputError: not a network with weights.
    """
    require_network(model, "the teacher")
    teacher = unwrapped(model)
    refuse_without_weights(teacher, "the teacher")
    if any(each.is_floating_point() and each.dtype != torch.float32 for each in teacher.state_dict().values()):
        return copy.deepcopy(teacher).float()
    return teacher


def refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Check that student and teacher share no parameter, because training would change the teacher.

    Raises:
        InputError: they are the same network or share a parameter.
    """
    if student is teacher:
        raise InputError("student and teacher are the same network. Pass copy.deepcopy(model) as the teacher.")
    of_teacher = {id(each) for each in teacher.parameters()}
    shared = [name for name, each in student.named_parameters() if id(each) in of_teacher]
    if shared:
        raise InputError(
            f"student and teacher share {', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}, and training "
            "would change the teacher. Pass copy.deepcopy(teacher)."
        )


def onnx_path(path: object) -> Path:
    """The path of the ONNX file to write.

    Raises:
        InputError: it is not a path `*.onnx` in an existing folder.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"the path is of type {type(path).__name__}. Pass the path of an .onnx file.")
    path = Path(cast("str", path))
    if "\0" in str(path) or path.suffix != ".onnx" or not path.parent.is_dir():
        raise InputError(f"cannot write {str(path)!r}. Possible: an .onnx file in an existing folder.")
    return path


def example_of(example: object) -> NetworkInput:
    """Images (N, C, H, W), or several input tensors in a tuple or dict; at least one.

    Raises:
        InputError: it is something else, or empty.
    """
    if not isinstance(example, Tensor | tuple | dict):
        raise InputError(
            f"the example is of type {type(example).__name__}. Pass images, a tensor (N, C, H, W), or several inputs "
            "in a tuple or dict."
        )
    images = images_of(example if isinstance(example, Tensor) else (example,))
    if not len(images):
        raise InputError("the example has no images. Pass at least one.")
    return images


def check_metadata(classes: object, pixels: object, images: NetworkInput) -> Normalization | None:
    """Check class names and the normalization of uint8 pixels; return the normalization as plain numbers.

    Raises:
        InputError: class names are not distinct strings, or mean and deviation are not for pixels in [0, 1].
    """
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise InputError(f"classes is {classes!r}. Pass a list of names, in the order of the logits.")
    names = list(cast("Sequence[object]", classes))
    wrong = [each for place, each in enumerate(names) if not isinstance(each, str) or each in names[:place]]
    if wrong:
        fault = " twice" if isinstance(wrong[0], str) else ", which is not a string"
        raise InputError(f"classes contains {wrong[0]!r}{fault}. Pass distinct strings, in the order of the logits.")
    if pixels is None:
        return None
    if not isinstance(images, Tensor):
        raise InputError("pixels needs a network with one input, but this network has several. Leave pixels out.")
    return check_normalization("pixels", pixels, images.shape[1])


def check_classes(session: Session, classes: Sequence[str]) -> None:
    """Check that there is one logit for each class.

    Raises:
        InputError: the number of logits differs from the number of classes.
    """
    if not classes:
        return
    rows = {each.name: np.zeros([1, *(size or 1 for size in each.shape[1:])], each.dtype) for each in session.inputs}
    logits = session.run(Inputs(rows))
    if logits.ndim == 2 and logits.shape[1] != len(classes):
        raise InputError(
            f"{len(classes)} class names are given, and the network has {logits.shape[1]} logits. Give one name per "
            "logit."
        )
