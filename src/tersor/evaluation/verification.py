"""Verification of an exported file: its outputs for the example images are compared with torch's.

An integer file rounds in other places than torch's simulation: a value between two steps may be rounded up in one and
down in the other, and biases are quantized. That changes the outputs about as much as quantization itself. So the
tolerance is relative to the effect of quantization, for any bit width and network size:

    difference = ||file - torch|| / ||torch||,   quantization = ||torch - torch without quantizers|| / ||torch||

For ten timm networks with random weights, in either runtime, difference / quantization was 0.1 to 1.2. A ratio above
`WARN_RATIO` gives a warning. A ratio above `_REFUSE_RATIO` cannot be explained by rounding, and the file is refused.
`FLOAT_TOLERANCES` applies where little or nothing is quantized; a runtime may compute in bfloat16 what the file does
not quantize (OpenVINO).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.errors import CompressionWarning, InputError
from tersor.data.network_inputs import NetworkInput
from tersor.evaluation.file_inputs import FileArrays
from tersor.evaluation.scoring import arrays_of
from tersor.evaluation.session import Session
from tersor.graph.comparison import outputs_of
from tersor.graph.parametrization import in_float32
from tersor.quantization.fake_quantize import FakeQuantize, quantizers_disabled

_IMAGES = 16
WARN_RATIO, _REFUSE_RATIO = 2.0, 5.0
FLOAT_TOLERANCES = {"float32": (0.002, 0.02), "bfloat16": (0.05, 0.2), "float16": (0.01, 0.1)}
LOOSEST_TOLERANCES = FLOAT_TOLERANCES["bfloat16"]
_ON_ONE = "On several images the outputs agree. Write a forward method whose result does not depend on the batch size."
_ON_SEVERAL = "On one image the outputs agree. Write a forward method whose result does not depend on the batch size."

Normalization = tuple[Sequence[float], Sequence[float]]


def verify(
    session: Session,
    model: nn.Module,
    example: NetworkInput,
    pixels: Normalization | None = None,
    in_full_precision: Callable[[], Session] | None = None,
) -> None:
    """Compare the outputs of a file with torch's, on the first images of `example` and on one.

    Args:
        session: the file, opened in the target runtime.
        model: the exported network.
        example: images (N, C, H, W), normalized as for `model`.
        pixels: mean and standard deviation, if the file takes uint8 pixels.
        in_full_precision: opens the file without bfloat16, to check whether that explains a difference.

    Raises:
        InputError: the outputs differ by more than rounding explains.

    Warns:
        CompressionWarning: they differ by more than usual.
    """
    model = in_float32(model)
    images = example[:_IMAGES].cpu().float()
    by_size = len(images) > 1 and _agrees(session, model, images[:1], pixels)
    advice = _ON_SEVERAL if by_size else _advice(session, model)
    finding = _difference_found(session, model, images, pixels, advice=advice)
    if finding is not None and session.precision != "float32" and in_full_precision is not None:
        _difference_found(in_full_precision(), model, images, pixels, advice=advice)
    if finding is not None:
        comparison = "Compare the accuracy of the file with that of the network in torch."
        warnings.warn(f"{finding}. {comparison}", CompressionWarning, stacklevel=3)
    if len(images) > 1 and not by_size:
        _difference_found(session, model, images[:1], pixels, advice=_advice(session, model) if finding else _ON_ONE)


def _agrees(session: Session, model: nn.Module, images: NetworkInput, pixels: Normalization | None) -> bool:
    """Whether the outputs differ no more than usual."""
    try:
        return _difference_found(session, model, images, pixels, advice="") is None
    except InputError:
        return False


def _difference_found(
    session: Session, model: nn.Module, example: NetworkInput, pixels: Normalization | None, *, advice: str
) -> str | None:
    """A sentence about a difference that is larger than usual; None without one.

    Raises:
        InputError: the difference is larger than rounding explains; the message ends with `advice`.
    """
    inputs, images = file_inputs(example, pixels)
    if (parameter := next(model.parameters(), None)) is not None:
        images = images.to(parameter)
    file_outputs = _of_file(session, inputs)
    if not file_outputs:
        return None  # class indices, which have no distance
    torch_outputs = _of_torch(model, images)
    with quantizers_disabled(model):
        float_outputs = _of_torch(model, images)
    _require_same_shapes(session, file_outputs, torch_outputs, len(images))
    tolerances = FLOAT_TOLERANCES.get(session.precision, LOOSEST_TOLERANCES)
    pairs = zip(differences(file_outputs, torch_outputs), differences(float_outputs, torch_outputs), strict=True)
    difference, quantization = max(pairs, key=lambda pair: pair[0] / max(WARN_RATIO * pair[1], tolerances[0]))
    warn_above, refuse_above = (
        max(ratio * quantization, tolerance)
        for ratio, tolerance in zip((WARN_RATIO, _REFUSE_RATIO), tolerances, strict=True)
    )
    if difference <= warn_above:
        return None
    finding = (
        f"on {len(images)} example image{'s' * (len(images) > 1)} the outputs of the file in {session.runtime} differ "
        f"from torch's by {100 * difference:.3g} %; quantization changes them by {100 * quantization:.3g} %"
    )
    _require_deterministic(torch_outputs, _of_torch(model, images, seed=1))
    if not difference <= refuse_above:
        raise InputError(f"{finding}. This is more than rounding can explain, so the file is discarded. {advice}")
    return finding


def _require_same_shapes(session: Session, of_file: list[Tensor], of_torch: list[Tensor], images: int) -> None:
    shapes = [", ".join(str(tuple(each.shape)) for each in outputs) for outputs in (of_file, of_torch)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"at batch size {images}, the file in {session.runtime} returns shape {shapes[0]}, but the "
            f"network in torch returns {shapes[1]}. The file is discarded. Write a forward method that accepts any "
            "number of images."
        )


def _require_deterministic(first: list[Tensor], second: list[Tensor]) -> None:
    """Two runs in torch with different seeds return the same."""
    if not all(map(torch.equal, second, first)):
        percent = 100 * max(differences(second, first))
        raise InputError(
            f"the forward method uses random numbers in eval mode: two runs in torch differ by {percent:.3g} %. Use a "
            "dropout module, or F.dropout(x, training=self.training)."
        )


def _advice(session: Session, model: nn.Module) -> str:
    """What to do about a file whose outputs are wrong."""
    steps = [
        each.scale.min().item()
        for name, each in model.named_modules()
        if isinstance(each, FakeQuantize) and each.enabled and "parametrizations" not in name
    ]
    if not steps:
        return (
            "The exporter of torch writes an operator of the network incorrectly, or the runtime computes it "
            "incorrectly. Use another runtime, or find the operator by exporting parts of the network, and replace it."
        )
    smallest = min(steps)
    if session.runtime == "openvino" and smallest < torch.finfo(torch.float32).eps:
        return (
            f"Activations of the network are so small that they are rounded in steps of {smallest:.1g}. OpenVINO adds "
            "such values incorrectly. Untrained weights often cause this: load trained weights."
        )
    return "Use another runtime, or keep layers in float with `exclude` of the quantization method."


def file_inputs(images: NetworkInput, pixels: Normalization | None) -> tuple[FileArrays, NetworkInput]:
    """The inputs of the file and of the network; pixels are rounded to integers for both."""
    if pixels is None:
        return arrays_of(images), images
    assert isinstance(images, Tensor)
    raw = pixels_of(images, pixels)
    mean, deviation = _by_channel(images, pixels)
    return np.ascontiguousarray(raw.numpy()), (raw / 255 - mean) / deviation


def pixels_of(images: Tensor, normalization: Normalization) -> Tensor:
    """The uint8 pixels of normalized images (N, C, H, W), rounded."""
    mean, deviation = _by_channel(images, normalization)
    return ((images * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _by_channel(images: Tensor, normalization: Normalization) -> list[Tensor]:
    """Mean and standard deviation in the shape (1, C, 1, 1)."""
    return [torch.tensor(each).reshape(1, -1, *[1] * (images.ndim - 2)) for each in normalization]


def _of_file(session: Session, inputs: FileArrays) -> list[Tensor]:
    """The floating-point outputs of a file."""
    try:
        values = session.run_all(inputs).values()
    except InputError:
        raise
    except Exception as error:  # the runtimes' own exceptions have no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{session.runtime} can open the file, but cannot run it: {reason[:300]}. The file is discarded. Use "
            "another runtime, or replace the layer in the network."
        ) from error
    return [each.float() for each in map(torch.from_numpy, values) if each.is_floating_point()]


def _of_torch(model: nn.Module, images: NetworkInput, seed: int = 0) -> list[Tensor]:
    """The same outputs of the network."""
    return [each.cpu() for each in outputs_of(model, images, seed)]


def differences(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """For each output, the norm of the difference relative to the norm of `expected`."""
    return [_difference(one, other) for one, other in zip(outputs, expected, strict=True)]


def _difference(outputs: Tensor, expected: Tensor) -> float:
    """Equal NaN and infinite values differ by 0; a NaN in one of the two makes the difference infinite."""
    same = (outputs == expected) | (outputs.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, outputs - expected).norm()
    relative = float(difference / expected.nan_to_num(0.0, 0.0, 0.0).norm().clamp(min=torch.finfo(torch.float32).tiny))
    return math.inf if math.isnan(relative) else relative
