"""A file that was written is run beside the network that it was written from, on the example images.

In integers a file rounds in other places than torch simulates: a sum that lies between two steps goes up in one and
down in the other, and biases lie on a grid. That moves the outputs about as far as quantization itself moves them. So
quantization is the yardstick, whatever the bits and however small the network:

    apart = ||file - torch|| / ||torch||,   moved = ||torch - torch without quantizers|| / ||torch||

Over ten timm networks with random weights, in one runtime or the other, apart / moved was 0.1 to 1.2. A difference
beyond `_WARNED` times `moved` is a warning. Beyond `_REFUSED` times `moved` no rounding explains it, and the file is
refused. Where little or nothing is quantized, `_IN_FLOAT` holds; a runtime may compute in bfloat16 what the
file does not quantize (OpenVINO).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.errors import CompressionWarning, InputError
from tersor.evaluation.session import Array, Session
from tersor.graph.comparison import outputs_of
from tersor.graph.parametrization import in_float32
from tersor.quantization.fake_quantize import quantizers_disabled

_IMAGES = 16
_WARNED, _REFUSED = 2.0, 5.0
_IN_FLOAT = {"float32": (0.002, 0.02), "bfloat16": (0.05, 0.2), "float16": (0.01, 0.1)}
_LOOSEST = _IN_FLOAT["bfloat16"]

Normalisation = tuple[Sequence[float], Sequence[float]]


def verify(session: Session, model: nn.Module, example: Tensor, pixels: Normalisation | None = None) -> None:
    """Compares the logits of a file, or its first output, with torch's, on the first images of `example`, and on one.

    Args:
        session: the file, opened in the runtime that will serve it.
        model: the network that it was written from.
        example: images (N, C, H, W), normalised as for `model`.
        pixels: mean and standard deviation, where the file takes uint8 pixels.

    Raises:
        InputError: the outputs differ by more than rounding explains.

    Warns:
        CompressionWarning: they differ by more than is usual.
    """
    model = in_float32(model)
    images = example[:_IMAGES].cpu().float()
    _compare(session, model, images, pixels, several=True)
    if len(images) > 1:
        _compare(session, model, images[:1], pixels, several=False)


def _compare(
    session: Session, model: nn.Module, example: Tensor, pixels: Normalisation | None, *, several: bool
) -> None:
    inputs, images = _of_both(example, pixels)
    images = images.to(next(model.parameters(), images))
    of_file = torch.from_numpy(session.run(np.ascontiguousarray(inputs)))
    if not of_file.is_floating_point():
        return  # numbers of classes: the next best one is no nearer than any other
    of_file, place = of_file.float(), session.logits or 0
    of_torch = outputs_of(model, images)[place].cpu()
    with quantizers_disabled(model):
        in_float = outputs_of(model, images)[place].cpu()
    if of_file.shape != of_torch.shape:
        raise InputError(
            f"for {len(images)} images the file in {session.runtime} gives {tuple(of_file.shape)}, and the network in "
            f"torch {tuple(of_torch.shape)}. The file is not kept. Possible: a forward that takes any number of images."
        )
    apart, moved = _apart(of_file, of_torch), _apart(in_float, of_torch)
    warned, refused = (
        max(limit * moved, in_float_limit)
        for limit, in_float_limit in zip((_WARNED, _REFUSED), _IN_FLOAT.get(session.precision, _LOOSEST), strict=True)
    )
    if apart <= warned:
        return
    found = (
        f"on {len(images)} example image{'s' * (len(images) > 1)} the outputs of the file in {session.runtime} differ "
        f"from torch's by {100 * apart:.3g} %; quantization moves them by {100 * moved:.3g} %"
    )
    again = outputs_of(model, images, seed=1)[place].cpu()
    if not torch.equal(again, of_torch):
        apart = 100 * _apart(again, of_torch)
        raise InputError(
            f"the forward draws random numbers also in eval: two runs in torch differ by {apart:.3g} %. "
            "Possible: dropout as a module, or F.dropout(x, training=self.training)."
        )
    if not apart <= refused:
        raise InputError(
            f"{found}. Rounding does not explain that, so the file is not kept. "
            + (
                "Possible: another runtime; leaving the layers at fault in float (`exclude`)."
                if several
                else "On several images they agree. Possible: a forward that does not depend on the number of images."
            )
        )
    if several:
        warnings.warn(f"{found}. Compare the accuracy of both.", CompressionWarning, stacklevel=4)


def _of_both(images: Tensor, pixels: Normalisation | None) -> tuple[Array, Tensor]:
    """What the file takes, and what torch takes in its place: pixels are whole numbers."""
    if pixels is None:
        return images.numpy(), images
    mean, deviation = (torch.tensor(each).reshape(1, -1, 1, 1) for each in pixels)
    raw = ((images * deviation + mean) * 255).round().clamp(0, 255)
    return raw.numpy().astype(np.uint8), (raw / 255 - mean) / deviation


def _apart(outputs: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, of that of what is wanted; NaN and infinity in the same places differ by nothing."""
    same = (outputs == wanted) | (outputs.isnan() & wanted.isnan())
    apart = torch.where(same, 0.0, outputs - wanted).norm()
    return float(apart / wanted.nan_to_num(0.0, 0.0, 0.0).norm().clamp(min=torch.finfo(torch.float32).tiny))
