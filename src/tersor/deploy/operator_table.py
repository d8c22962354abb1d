"""The exporter's table of ONNX operators, built once per process.

`torch.onnx.export` builds it for every file, from the source code of 500 functions: half of the time of a small export.
It depends on the opset alone.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.onnx._internal.exporter._registration import ONNXRegistry


@contextmanager
def one_operator_table() -> Generator[None]:
    """While this runs, every `torch.onnx.export` gets a copy of the same table."""
    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(_copied)):  # torch.onnx.export takes no table
        yield


def _copied(**options: Any) -> ONNXRegistry:
    built = _built(**options)
    table = ONNXRegistry()
    vars(table).update(vars(built), functions={name: [*found] for name, found in built.functions.items()})
    return table


_built = functools.cache(ONNXRegistry.from_torchlib)
