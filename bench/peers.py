"""Quantize and prune with other tools, from the same network and the same images.

ONNX Runtime's quantizer and NNCF get the FP32 ONNX file and the settings that their documentation recommends for a CPU:
ONNX Runtime after its own preprocessing, with Q/DQ, per-channel scales, uint8 activations and int8 weights; NNCF on the
network as OpenVINO reads it. Below 8 bits, torchao and Brevitas simulate in torch what no runtime computes. All other
options keep their defaults.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.models.cifar_resnet import CifarResNet

os.environ.setdefault("NNCF_CI", "1")  # must be set before the import: disables telemetry


def onnxruntime_static(float32: Path, images: Tensor, path: Path, *, reduce_range: bool = False) -> float:
    """Write `path` (.onnx) with `onnxruntime.quantization.quantize_static`.

    Args:
        float32: the ONNX file of the network, one input.
        images: calibration images (N, C, H, W), normalized.
        path: the file to write.
        reduce_range: use 7-bit weights, which ONNX Runtime advises if a CPU adds 8-bit products in 16 bits.

    Returns:
        Seconds, including preprocessing.
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
    """Write `path` (.xml and its .bin) with `nncf.quantize`, image by image as in its documentation.

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


def post_training(maker: str, float32: Path, images: Tensor, path: Path) -> Path:
    """Write the 8-bit file of NNCF or of `quantize_static`, and return its path."""
    if maker == "nncf":
        path = path.with_suffix(".xml")
        nncf_post_training(float32, images, path)
    else:
        onnxruntime_static(float32, images, path)
    return path


def torchao_post_training(network: nn.Module, images: Tensor, bits: int, activation_bits: int) -> nn.Module:
    """Quantize a network with PT2E and torchao's x86 quantizer; the first and last layer keep 8 bits.

    The quantizer supports 8 bits only. For fewer bits the integer limits are changed, and nothing else.

    Args:
        network: a CIFAR ResNet.
        images: calibration images (N, C, H, W), normalized.
        bits: bits of the weights.
        activation_bits: bits of the activations.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    eight: Any = x86.get_default_x86_inductor_quantization_config()
    weight = dataclasses.replace(eight.weight, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1)
    activation = dataclasses.replace(eight.input_activation, quant_min=0, quant_max=2**activation_bits - 1)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(dataclasses.replace(eight, weight=weight, input_activation=activation))
    for name in ("conv1", "linear"):
        quantizer.set_module_name_qconfig(name, eight)
    any_size = {0: torch.export.Dim("batch", min=2)}
    prepared = prepare_pt2e(
        torch.export.export(network, (images[:50],), dynamic_shapes=(any_size,)).module(), quantizer
    )
    with torch.no_grad():
        for batch in images.split(50):
            prepared(batch)
    return convert_pt2e(prepared)


def torchao_training(network: nn.Module, images: Tensor) -> nn.Module:
    """Prepare a network for PT2E's quantization-aware training with torchao's x86 quantizer, 8 bits.

    Args:
        network: a network in training mode.
        images: a batch (N, C, H, W) of the size used in training.
    """
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return prepare_qat_pt2e(torch.export.export(network, (images,)).module(), quantizer)


class _Pooled(CifarResNet):
    """The same network with a final mean that Brevitas can rewrite; it fails on `x.mean(dim=(2, 3))`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) for images (N, 3, H, W)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def brevitas_post_training(
    network: nn.Module, images: Tensor, bits: int, activation_bits: int, *, gptq: bool
) -> nn.Module:
    """Quantize a ResNet-20 with Brevitas, following its ImageNet example; the first and last layer keep 8 bits.

    BatchNorm is folded, followed by 20 rounds of equalization. Weights are per channel by squared error; activations
    are quantized at the input of each layer (not at sums); then GPTQ if requested, and bias correction.

    Args:
        network: the ResNet-20.
        images: calibration images (N, C, H, W), normalized.
        bits: bits of the weights.
        activation_bits: bits of the activations.
        gptq: compensate rounding errors among the weights.
    """
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    pooled = _Pooled(20)
    pooled.load_state_dict(network.state_dict())
    folded: Any = preprocess_for_quantize(pooled.eval(), equalize_iters=20, equalize_merge_bias=True, merge_bn=True)

    def laid(model: Any, bits: int, activation_bits: int) -> Any:
        return ptq_common.quantize_model(
            model,
            backend="layerwise",
            weight_bit_width=bits,
            act_bit_width=activation_bits,
            bias_bit_width=32,
            weight_quant_granularity="per_channel",
            act_quant_percentile=99.999,
            act_quant_type="sym",
            scale_factor_type="float_scale",
            quant_format="int",
            weight_param_method="mse",
        )

    eight = laid(copy.deepcopy(folded), 8, 8)
    model = laid(folded, bits, activation_bits).eval()
    model.linear = eight.linear  # its example finds the last layer by ImageNet's 1,000 classes
    batches = [(batch, None) for batch in images.split(50)]
    with torch.no_grad():
        model(images[:50])  # sets scales
    ptq_common.calibrate(batches, model)
    if gptq:
        ptq_common.apply_gptq(batches, model, act_order=True)
    ptq_common.apply_bias_correction(batches, model)
    return model
