"""Latency of exported files in the target runtime, interleaved with one reference file, and cached by structure.

All latencies of a search are comparable, although they are measured at different times: each is the ratio to the
reference in the same rounds, times the reference's latency at the start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from pydantic import TypeAdapter, ValidationError

from tersor.core.files import replacing
from tersor.evaluation.latency import Array, measure_latency
from tersor.evaluation.session import Session, open_session

Milliseconds = dict[int, float]
_FILE: TypeAdapter[dict[str, Milliseconds]] = TypeAdapter(dict[str, Milliseconds])
_GROUPS = 3
"""Groups of rounds of a candidate; sessions are reopened for each group."""
REFERENCE = "reference"


def structure_hash(path: Path) -> str:
    """A hash of everything in an ONNX file but the values of large tensors: latency depends on these shapes only."""
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        tensor.raw_data = b""
        for values in (tensor.float_data, tensor.int32_data, tensor.int64_data):
            del values[:]
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


class Measurement:
    """Measures files against a reference.

    Args:
        cache: a JSON file with the latencies so far.
        runtime: the target runtime.
        example: one image (1, C, H, W).
        batch_sizes: images per batch.
        seconds: time limit for each batch size of one measurement.
    """

    def __init__(
        self, cache: Path, runtime: str, example: Array, batch_sizes: Sequence[int], *, seconds: float = 2.0
    ) -> None:
        self.batch_sizes = tuple(batch_sizes)
        self._cache, self._runtime, self._seconds = cache, runtime, seconds
        self._example = np.ascontiguousarray(example[:1])
        self._reference: Path | None = None

    def baselines(self, openers: Mapping[str, Callable[[], Session]], reference: str) -> dict[str, Milliseconds]:
        """Measure the free baselines together; later files are compared with the file `reference`."""
        cached = self._read()
        if not all(name in cached for name in openers):
            timings = measure_latency(
                openers, self._example, self.batch_sizes, seconds=self._seconds, least_groups=_GROUPS
            )
            cached |= {name: {size: timings.spread(name, size).median for size in self.batch_sizes} for name in openers}
            cached[REFERENCE] = cached[reference]
            self._write(cached)
        return {name: cached[name] for name in openers}

    def compare_with(self, reference: Path) -> None:
        """Set the file of the reference."""
        self._reference = reference

    def latency(self, file: Path, pixels: Array | None = None) -> Milliseconds:
        """The latency of a file, from the cache if a file of the same structure was measured.

        Args:
            file: an ONNX file.
            pixels: an image (1, C, H, W) of another size than that of the reference.
        """
        cached, key = self._read(), structure_hash(file)
        if key not in cached:
            cached[key] = self._measure(file, self._example if pixels is None else pixels, cached[REFERENCE])
            self._write(cached)
        return cached[key]

    def _measure(self, file: Path, image: Array, reference: Milliseconds) -> Milliseconds:
        assert self._reference is not None
        if image.shape != self._example.shape:  # rounds need one input; files of another size are timed alone
            openers = {"file": partial(open_session, file, self._runtime)}
            timings = measure_latency(openers, image, self.batch_sizes, seconds=self._seconds, least_groups=_GROUPS)
            return {size: timings.spread("file", size).median for size in self.batch_sizes}
        openers = {
            name: partial(open_session, path, self._runtime)
            for name, path in (("file", file), (REFERENCE, self._reference))
        }
        timings = measure_latency(openers, image, self.batch_sizes, seconds=self._seconds, least_groups=_GROUPS)
        return {size: timings.ratio("file", REFERENCE, size).value * reference[size] for size in self.batch_sizes}

    def _read(self) -> dict[str, Milliseconds]:
        try:
            return _FILE.validate_json(self._cache.read_bytes())
        except (FileNotFoundError, ValidationError):  # a damaged file: measure again
            return {}

    def _write(self, cached: Mapping[str, Milliseconds]) -> None:
        with replacing(self._cache) as partial_file:
            partial_file.write_text(json.dumps(cached))
