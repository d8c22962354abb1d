"""Operators of an artifact that run in float, for `numbers.json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from tersor.data.network_inputs import NetworkInput
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.integer_coverage import integer_coverage


def float_operators(model: nn.Module, example: NetworkInput) -> tuple[dict[str, Any], str | None]:
    """Fields of the artifact in `numbers.json`, and a warning if less than 95 % of the MACs are in integers.

    Without quantizers `integer_macs_share`, in [0, 1], is None and `float_operators` is empty.

    Args:
        model: the compressed network in PyTorch.
        example: images (N, C, H, W); the first one is run.
    """
    covered = integer_coverage(model, example)
    quantized = any(isinstance(module, FakeQuantize) and module.enabled for module in model.modules())
    fields = {
        "integer_macs_share": covered.share if quantized else None,
        "float_operators": [asdict(each) for each in covered.operators] if quantized else [],
        "uncounted_operators": list(covered.uncounted),
    }
    return fields, covered.warning if quantized else None
