"""Operators of an artifact that are not computed in integers, for `numbers.json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.integer_coverage import integer_coverage


def float_operators(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Fields of the artifact in `numbers.json`.

    `integer_macs_share`, from 0 to 1, is None and `float_operators` is empty for a network that is not quantized.

    Args:
        model: the compressed network, as torch has it.
        example: images (N, C, H, W); the first is run.
    """
    covered = integer_coverage(model, example)
    quantized = any(isinstance(module, FakeQuantize) and module.enabled for module in model.modules())
    return {
        "integer_macs_share": covered.share if quantized else None,
        "float_operators": [asdict(each) for each in covered.operators] if quantized else [],
        "uncounted_operators": list(covered.uncounted),
    }
