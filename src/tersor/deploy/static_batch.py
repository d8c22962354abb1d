"""Static batch sizes: which networks are exported with a fixed batch size, and why.

OpenVINO 2026.1 to 2026.3 crashes with a segmentation fault when an 8-bit network with a dynamic batch runs on small
images on a processor with AMX (openvino issue 37577). A static batch avoids it.
"""

from __future__ import annotations

from torch import nn

from tersor.core.device import cpu_flags
from tersor.core.machine import installed_version
from tersor.core.target import Target
from tersor.quantization.quantizers import find_quantizers

_FIRST_AFFECTED, _FIRST_FIXED = (2026, 1), (2026, 4)
_AMX = "amx_int8"


def crashes_on_dynamic_batches(openvino: str, flags: frozenset[str]) -> bool:
    """Whether OpenVINO of this version crashes on 8-bit networks with a dynamic batch on a processor with `flags`."""
    year, release = (int(part) for part in openvino.split(".")[:2])
    return _AMX in flags and _FIRST_AFFECTED <= (year, release) < _FIRST_FIXED


def batch_for(model: nn.Module, target: Target) -> int | None:
    """The batch size in the file of `model`: the target's, 1 where a dynamic one would crash, or None for dynamic."""
    if target.batch is not None or target.runtime != "openvino":
        return target.batch
    quantizers, version = find_quantizers(model), installed_version("openvino")
    integers = quantizers is not None and bool(quantizers.activations)
    return 1 if integers and version and crashes_on_dynamic_batches(version, cpu_flags()) else None


def static_batch_reason() -> str:
    """Why `batch_for` fixed a batch size that the target leaves open."""
    return (
        f"the file has a batch size of 1: OpenVINO {installed_version('openvino')} crashes on this processor (AMX) "
        "with a dynamic batch and 8 bits. A batch of n images is measured as n runs. With OpenVINO 2026.4 or later the "
        "batch size is dynamic. To set another size, write target.batch in a recipe, or pass batch=... to "
        "tersor.export."
    )
