"""Which networks are written with a fixed number of images a batch.

OpenVINO 2026.1 to 2026.3 ends with a segmentation fault where an 8-bit network with a dynamic batch is run on small
images on a processor with AMX (openvino issue 37577). With a static batch it does not.
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
    """Images a batch in the file of `model`: the target's, 1 where any number would crash, or None for any number."""
    if target.batch is not None or target.runtime != "openvino":
        return target.batch
    laid, version = find_quantizers(model), installed_version("openvino")
    integers = laid is not None and bool(laid.activations)
    return 1 if integers and version and crashes_on_dynamic_batches(version, cpu_flags()) else None


def reason() -> str:
    """Why `batch_for` fixed a batch that the target leaves open."""
    return (
        f"the file takes one image at a time: OpenVINO {installed_version('openvino')} crashes on this "
        "processor (AMX) where an 8-bit network has a dynamic batch. A batch is measured as that many runs. With "
        "OpenVINO 2026.4 or later the file takes any batch; target.batch sets another number."
    )
