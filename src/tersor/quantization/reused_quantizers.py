"""Quantizers for methods that train: those of an earlier stage, or new ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.batch import first_batch
from tersor.graph.capture import capture
from tersor.quantization.quantizer_options import QuantizedTrainingOptions
from tersor.quantization.quantizers import Quantizers, ends, find_quantizers, insert_quantizers, require_data


def insert_or_reuse_quantizers(
    model: nn.Module, options: QuantizedTrainingOptions, *, data: Iterable[Any] | None, target: Target, method: str
) -> Quantizers:
    """For methods that train: the quantizers of an earlier stage, or new ones on the captured network.

    Args:
        model: the network.
        options: bit widths and kinds of the grids, which must agree with those of the earlier stage.
        data: images to calibrate with; needed for new quantizers.
        target: runtime and processor that the network is compressed for.
        method: the method's name, for error messages.

    Raises:
        InputError: no data, a pattern that matches nothing, no layer left, options that differ from the grids of the
            earlier stage, or grids that another method of the stage trains.
    """
    quantizers = find_quantizers(model)
    if quantizers is None:
        images = first_batch(require_data(data, method), method)
        return insert_quantizers(
            capture(model, images), options.precision, exclude=options.exclude, target=target, method=method
        )
    if options.exclude:
        raise InputError("an earlier stage has quantized the network. Write `exclude` in that stage.")
    if any(each.is_trained for each in quantizers.all()):
        raise InputError("a method of this stage trains the grids already. Write either qat or lsq, not both.")
    _require_same_options(quantizers, options, method)
    return quantizers


def _require_same_options(quantizers: Quantizers, options: QuantizedTrainingOptions, method: str) -> None:
    """The options that are set agree with the grids of an earlier stage."""
    first_and_last = ends(quantizers.graph)
    entering = set(map(quantizers.input_of, first_and_last))
    existing = {
        "bits": {quantizers.of_weight(name).grid.bits for name in quantizers.layers if name not in first_and_last},
        "activation_bits": {
            quantizers.of_activation(name).grid.bits for name in quantizers.activations if name not in entering
        },
        "first_last_bits": {quantizers.of_weight(name).grid.bits for name in first_and_last & {*quantizers.layers}},
    }
    for key, widths in existing.items():
        bits = getattr(options, key)
        if bits is not None and widths - {bits}:
            raise InputError(
                f"{method} has {key}: {bits}, but an earlier stage has quantized the network to "
                f"{', '.join(map(str, sorted(widths)))} bits. Leave out {key} to keep those bits, or write the same "
                f"{key} in the earlier stage."
            )
    kinds = {bool(quantizers.of_weight(name).scale.ndim) for name in quantizers.layers}
    if options.per_channel is not None and kinds - {options.per_channel}:
        raise InputError(
            f"{method} has per_channel: {str(options.per_channel).lower()}, but an earlier stage has quantized with "
            "the other value. Leave out per_channel to keep that value, or write the same one in the earlier stage."
        )
