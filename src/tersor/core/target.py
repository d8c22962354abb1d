"""The target of compression: runtime and kind of processor. Does not import torch."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tersor.core.plain_values import PlainRecord

Runtime = Literal["onnxruntime", "openvino"]
Cpu = Literal["vnni", "avx2", "arm64"]


@cache
def cpu_kind() -> Cpu:
    """Return how this machine accumulates products of 8-bit integers.

    `vnni` and `arm64` accumulate in 32 bits. `avx2` adds two products in 16 bits and saturates, since 2 * 255 * 127
    exceeds 32767, so weights must be smaller there.
    """
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return "arm64"
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set[str]()
    return "vnni" if flags & {"avx512_vnni", "avx_vnni", "amx_int8"} else "avx2"


class Target(PlainRecord):
    """Where the artifact will run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    runtime: Annotated[Runtime, Field(description="the runtime that will run the file")] = "onnxruntime"
    cpu: Annotated[
        Cpu,
        Field(
            description="type of the processor that will run the file; by default that of this machine. vnni and arm64 "
            "sum 8-bit products in 32 bits, avx2 in 16 bits, which can saturate"
        ),
    ] = Field(default_factory=cpu_kind)
    input: Annotated[
        Literal["normalized", "uint8"],
        Field(description="uint8: raw pixels 0..255, with mean and standard deviation inside the graph"),
    ] = "normalized"
    batch: Annotated[
        int | None,
        Field(
            ge=1,
            description="fixed batch size of the file; by default any size, or 1 with a warning if the network needs a "
            "fixed size or the installed OpenVINO would crash",
        ),
    ] = None
