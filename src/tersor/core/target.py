"""What the compressed network will run on: the runtime and the kind of processor. Torch is not imported here."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Runtime = Literal["onnxruntime", "openvino"]
Cpu = Literal["vnni", "avx2", "arm64"]


@cache
def cpu_kind() -> Cpu:
    """How this machine multiplies 8-bit integers.

    `vnni` and `arm64` add the products in 32 bits. `avx2` adds two of them in 16 bits, which saturates: 255 * 127
    twice is more than 32767, so weights must be kept smaller there.
    """
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return "arm64"
    facts = Path("/proc/cpuinfo")
    flags = set(facts.read_text().split()) if facts.exists() else set[str]()
    return "vnni" if flags & {"avx512_vnni", "avx_vnni", "amx_int8"} else "avx2"


class Target(BaseModel):
    """What the artifact is made for."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    runtime: Runtime = "onnxruntime"
    cpu: Annotated[
        Cpu, Field(description="how 8-bit products are added; avx2 saturates. This machine's by default")
    ] = Field(default_factory=cpu_kind)
    input: Annotated[
        Literal["normalized", "uint8"],
        Field(description="uint8: raw pixels 0..255, with mean and standard deviation inside the graph"),
    ] = "normalized"
    batch: Annotated[int | None, Field(ge=1, description="images a batch, fixed in the file; any number if left")] = (
        None
    )
