"""Latency of exported files in the target runtime, interleaved with one reference file, and cached by structure.

Latencies of a search are comparable, although they are measured at different times: each is the ratio to the reference
in the same rounds, times the reference's latency at the start. The interval of the ratio is the error. The exception is
a file for an image size other than the reference's: it is timed alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from pydantic import TypeAdapter, ValidationError

from tersor.core.files import replacing
from tersor.evaluation.latency import Array, measure_latency
from tersor.evaluation.results import Speedup
from tersor.evaluation.session import Session, open_session
from tersor.evaluation.timings import Ratio

Milliseconds = Mapping[int, float]


@dataclass(frozen=True)
class Latency:
    """Latency of a file by batch size.

    Attributes:
        ms: milliseconds.
        error: half the width of the 95 % interval, as a fraction of the latency.
    """

    ms: dict[int, float]
    error: dict[int, float]


_FILE: TypeAdapter[dict[str, Latency]] = TypeAdapter(dict[str, Latency])
_GROUPS = 3
"""Groups of rounds of a candidate; sessions are reopened for each group."""
_REFERENCE = "reference"


def structure_hash(path: Path) -> str:
    """A hash of everything in an ONNX file that its latency depends on: operators, edges, and types and shapes.

    Values and names are left out. Equal constants share one tensor in a file, so that names differ by chance between
    two networks of the same structure.
    """
    model = onnx.load(str(path))
    graph = model.graph
    known: dict[str, object] = {each.name: (each.data_type, tuple(each.dims)) for each in graph.initializer}
    inputs = [each for each in graph.input if each.name not in known]
    known |= {each.name: ("input", place) for place, each in enumerate(inputs)}
    parts: list[object] = [each.type.SerializeToString(deterministic=True) for each in (*inputs, *graph.output)]
    parts += [(each.domain, each.version) for each in model.opset_import]
    parts += [each.SerializeToString(deterministic=True) for each in model.functions]
    for place, node in enumerate(graph.node):
        attributes = [each.SerializeToString(deterministic=True) for each in node.attribute]
        parts.append((node.domain, node.op_type, attributes, [known.get(name, name) for name in node.input]))
        known |= {name: (place, number) for number, name in enumerate(node.output)}
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def error_of(ratio: Ratio | Speedup) -> float:
    """Half the width of the interval of a ratio, as a fraction of it."""
    return round(math.log(ratio.high / ratio.low) / 2, 4)


class Measurement:
    """Measures files against a reference.

    Args:
        cache: a JSON file with the latencies so far.
        runtime: the target runtime.
        example: one image (1, C, H, W).
        batch_sizes: images per batch.
        seconds: time limit for each batch size of one measurement.
    """

    def __init__(self, cache: Path, runtime: str, example: Array, batch_sizes: Sequence[int], seconds: float) -> None:
        self.batch_sizes = tuple(batch_sizes)
        self._cache, self._runtime, self._seconds = cache, runtime, seconds
        self._example = np.ascontiguousarray(example[:1])
        self._reference: tuple[Path, Milliseconds] | None = None

    def baselines(self, openers: Mapping[str, Callable[[], Session]], reference: str) -> dict[str, Latency]:
        """Measure the free baselines together; the errors are those of the ratios to the baseline `reference`."""
        cached = self._read()
        if not all(name in cached for name in openers):
            timings = measure_latency(
                openers, self._example, self.batch_sizes, seconds=self._seconds, least_groups=_GROUPS
            )
            for name in openers:
                ms = {size: timings.spread(name, size).median for size in self.batch_sizes}
                ratios = {size: timings.ratio(name, reference, size) for size in self.batch_sizes if name != reference}
                cached[name] = Latency(ms, {size: error_of(ratio) for size, ratio in ratios.items()})
            self._write(cached)
        return {name: cached[name] for name in openers}

    def compare_with(self, reference: Path, milliseconds: Milliseconds) -> None:
        """Set the file of the reference, and its latency."""
        self._reference = reference, milliseconds

    def latency(self, file: Path, pixels: Array | None = None) -> Latency:
        """The latency of a file, from the cache if a file of the same structure was measured.

        Args:
            file: an ONNX file.
            pixels: an image (1, C, H, W) whose size differs from that of the reference.
        """
        cached, key = self._read(), structure_hash(file)
        if key not in cached:
            cached[key] = self._measure(file, self._example if pixels is None else pixels)
            self._write(cached)
        return cached[key]

    def _measure(self, file: Path, image: Array) -> Latency:
        assert self._reference is not None
        reference, milliseconds = self._reference
        alone = image.shape != self._example.shape  # rounds need one input; files of another size are timed alone
        files = {"file": file} if alone else {"file": file, _REFERENCE: reference}
        openers = {name: partial(open_session, path, self._runtime) for name, path in files.items()}
        timings = measure_latency(openers, image, self.batch_sizes, seconds=self._seconds, least_groups=_GROUPS)
        if alone:
            groups = timings.groups["file"]
            ratios = {
                size: Ratio.of(groups[size], [[1.0] * len(group) for group in groups[size]])
                for size in self.batch_sizes
            }
            ms = {size: timings.spread("file", size).median for size in self.batch_sizes}
        else:
            ratios = {size: timings.ratio("file", _REFERENCE, size) for size in self.batch_sizes}
            ms = {size: ratio.value * milliseconds[size] for size, ratio in ratios.items()}
        return Latency(ms, {size: error_of(ratio) for size, ratio in ratios.items()})

    def _read(self) -> dict[str, Latency]:
        try:
            return _FILE.validate_json(self._cache.read_bytes())
        except (FileNotFoundError, ValidationError):  # a damaged file: measure again
            return {}

    def _write(self, cached: Mapping[str, Latency]) -> None:
        with replacing(self._cache) as partial_file:
            partial_file.write_bytes(_FILE.dump_json(dict(cached)))
