"""The peak throughput of this machine in each runtime and precision, and the share of it that a network reaches.

A network that is far below the peak does not become much faster with fewer MACs: its time goes to memory traffic, to
rounding and to the start of each operator. Needs numpy, never torch.

The peak is that of two 3x3 convolutions of 256 channels on 14x14 values, with one image for each thread, which every
runtime computes near its best. It is measured through the same sessions as all latencies, so the threads and the
precision are those of the network. The fastest run counts: other work on the machine only makes runs slower, and some
runs of a few milliseconds are not disturbed by it. The median shows how loaded the machine was.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.machine import default_threads
from tersor.evaluation.results import Peak
from tersor.evaluation.session import Array, Session, open_session

INTEGERS = "int8"
_CHANNELS, _SIDE, _KERNEL, _LAYERS = 256, 14, 3, 2
_MACS = _LAYERS * _SIDE**2 * _CHANNELS**2 * _KERNEL**2
_LEAST_RUNS, _SECONDS = 20, 0.4


def multiply_peaks(runtimes: Iterable[str]) -> list[Peak]:
    """The peak of each runtime in float32, in its default precision and in 8-bit integers, measured once per process.

    Args:
        runtimes: installed runtimes.
    """
    return [peak for runtime in runtimes for peak in _known(runtime, default_threads())]


def share_of_peak(
    runtime: str, precision: str, macs: int, milliseconds: float, peaks: Sequence[Peak], integers: float = 0.0
) -> float | None:
    """The time of a network's multiplications at the peak, as a fraction of its latency; None without that peak.

    Args:
        runtime: runtime of the network.
        precision: data type of the products that are not computed in integers.
        macs: multiplications of a batch.
        milliseconds: latency of the batch.
        peaks: as measured on the same machine.
        integers: fraction of the MACs that are computed in 8-bit integers.
    """
    rates = {(peak.runtime, peak.precision): peak.macs_per_second for peak in peaks}
    parts = {precision: 1 - integers, INTEGERS: integers}
    seconds = 0.0
    for kind, part in parts.items():
        if not part:
            continue
        if (runtime, kind) not in rates:
            return None
        seconds += part * macs / rates[runtime, kind]
    return 1000 * seconds / milliseconds


def measure_peaks(runtime: str, threads: int) -> list[Peak]:
    """Measure the peaks of a runtime with this number of threads."""
    peaks: list[Peak] = []
    image = np.random.default_rng(0).standard_normal((threads, _CHANNELS, _SIDE, _SIDE), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        floats, integers = (_write(Path(folder) / f"{kind}.onnx", kind) for kind in ("float32", INTEGERS))
        in_float32 = open_session(floats, runtime, precision="float32", threads=threads)
        default = open_session(floats, runtime, threads=threads)
        peaks.append(_measure(in_float32, "float32", image))
        if default.precision != "float32":
            peaks.append(_measure(default, default.precision, image))
        peaks.append(_measure(open_session(integers, runtime, threads=threads), INTEGERS, image))
    return peaks


_known = cache(measure_peaks)


def _measure(session: Session, precision: str, image: Array) -> Peak:
    session.run(image)
    seconds: list[float] = []
    while len(seconds) < _LEAST_RUNS or sum(seconds) < _SECONDS:
        start = time.perf_counter()
        session.infer(image)
        seconds.append(time.perf_counter() - start)
    rates = len(image) * _MACS / np.array(seconds)
    return Peak.model_validate(
        {
            "runtime": session.runtime,
            "precision": precision,
            "macs_per_second": float(rates.max()),
            "median": float(np.median(rates)),
            "n": len(seconds),
        }
    )


def _write(path: Path, kind: str) -> Path:
    """Write the network of convolutions, in float or with Q/DQ nodes on every input, weight and output."""
    import onnx  # here, because it is slow to import
    from onnx import TensorProto, helper, numpy_helper

    drawn = np.random.default_rng(0).standard_normal((_CHANNELS, _CHANNELS, _KERNEL, _KERNEL), np.float32)
    nodes: list[Any] = []
    constants = {"weight": drawn / np.sqrt(np.float32(_CHANNELS * _KERNEL**2))}
    value, weight = "images", "weight"
    if kind == INTEGERS:
        scale = np.float32(4 / 127)
        constants = {
            "weight": np.clip(np.rint(32 * drawn), -127, 127).astype(np.int8),
            "weight_scale": np.full(_CHANNELS, 1 / (32 * np.sqrt(_CHANNELS * _KERNEL**2)), np.float32),
            "weight_zero": np.zeros(_CHANNELS, np.int8),
            "scale": np.array(scale),
            "zero": np.array(128, np.uint8),
        }
        nodes.append(
            helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["float_weight"], axis=0)
        )
        value, weight = _rounded(nodes, helper, value), "float_weight"
    for layer in range(_LAYERS):
        nodes.append(helper.make_node("Conv", [value, weight], [f"layer{layer}"], pads=[1, 1, 1, 1]))
        value = _rounded(nodes, helper, f"layer{layer}") if kind == INTEGERS else f"layer{layer}"
    shape = [None, _CHANNELS, _SIDE, _SIDE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", value)]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "multiply_peak", [ends[0]], [ends[1]], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def _rounded(nodes: list[Any], helper: Any, value: str) -> str:
    """Add Q/DQ nodes after a value; returns the name of the result."""
    nodes.append(helper.make_node("QuantizeLinear", [value, "scale", "zero"], [f"{value}_integer"]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{value}_integer", "scale", "zero"], [f"{value}_float"]))
    return f"{value}_float"
