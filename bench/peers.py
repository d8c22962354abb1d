"""What others make of the same FP32 ONNX file and the same images: ONNX Runtime's quantizer, and NNCF's.

Both run with what their documentation recommends for a CPU: ONNX Runtime after its own preprocessing, with Q/DQ, a
scale for each channel, uint8 activations and int8 weights; NNCF on the network as OpenVINO reads it. What is not named
here is their default.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

os.environ.setdefault("NNCF_CI", "1")  # before its import: no telemetry


def onnxruntime_static(float32: Path, images: Tensor, path: Path, *, reduce_range: bool = False) -> float:
    """Writes `path` (.onnx) with `onnxruntime.quantization.quantize_static`.

    Args:
        float32: the ONNX file of the network, one input.
        images: to calibrate with, (N, C, H, W), normalised.
        path: the file to write.
        reduce_range: weights of 7 bits, which ONNX Runtime advises where a CPU adds 8-bit products in 16 bits.

    Returns:
        Seconds, preprocessing included.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(str(float32)).graph.input[0].name
    batches: Iterator[dict[str, Any]] = iter([{name: batch.numpy()} for batch in images.split(50)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(batches, None)

    logging.getLogger().setLevel(logging.ERROR)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(float32), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return time.perf_counter() - start


def nncf_post_training(float32: Path, images: Tensor, path: Path) -> float:
    """Writes `path` (.xml, and its .bin) with `nncf.quantize`, image by image as its documentation does.

    Returns:
        Seconds.
    """
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    start = time.perf_counter()
    network = openvino.Core().read_model(float32)
    dataset = nncf.Dataset(list(images.numpy()[:, None]))
    openvino.save_model(nncf.quantize(network, dataset, subset_size=len(images)), path)
    return time.perf_counter() - start
