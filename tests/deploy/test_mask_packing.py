from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tersor.deploy.mask_packing import pack_masks
from tersor.deploy.onnx import export
from tersor.evaluation.session import installed_runtimes, open_session


def added(mask: np.ndarray) -> onnx.ModelProto:
    """A network that adds `mask` to its input."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["input", "mask"], ["output"])],
        "mask",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, mask.shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, mask.shape)],
        [numpy_helper.from_array(mask, "mask")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def output(proto: onnx.ModelProto, shape: tuple[int, ...]) -> np.ndarray:
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {"input": np.zeros(shape, np.float32)})[0]


def draw(values: list[float]) -> np.ndarray:
    return np.random.default_rng(0).choice(np.array(values, np.float32), (4, 16, 16))


@pytest.mark.parametrize(
    "values",
    [[0, -100], [0, float(np.finfo(np.float32).min)], [0.1 * step for step in (-1, 0, 1)], [0], [-3, 0, 381]],
    ids=["Swin", "smallest float", "three values", "zeros", "127 steps"],
)
def test_a_mask_with_few_values_is_stored_as_int8_and_restored_exactly(values):
    mask = draw(values)
    proto = added(mask)
    pack_masks(proto.graph)
    stored = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert stored == {"mask.int8": TensorProto.INT8, "mask.step": TensorProto.FLOAT}
    assert np.array_equal(output(proto, mask.shape), mask)


@pytest.mark.parametrize(
    "mask",
    [
        draw([0, -np.inf]),
        draw([0, 1, 128]),
        draw([0, 1, 1.5]),
        np.random.default_rng(0).normal(size=(4, 16, 16)).astype(np.float32),
        np.zeros((15, 17), np.float32),
    ],
    ids=["infinite", "128 steps", "no multiple", "weights", "small"],
)
def test_other_constants_are_not_changed(mask):
    proto = added(mask)
    before = proto.SerializeToString()
    pack_masks(proto.graph)
    assert proto.SerializeToString() == before


def test_a_constant_with_a_subnormal_value_causes_no_overflow():
    proto = added(draw([1e-41, 1.0]))
    with np.errstate(over="raise"):
        pack_masks(proto.graph)
    assert [tensor.name for tensor in proto.graph.initializer] == ["mask"]


def test_a_weight_of_a_matrix_product_is_not_changed():
    proto = added(draw([-1, 1]))
    proto.graph.node[0].op_type = "MatMul"
    before = proto.SerializeToString()
    pack_masks(proto.graph)
    assert proto.SerializeToString() == before


class Masked(nn.Module):
    """Values plus an attention mask."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.from_numpy(draw([0, -100])))

    def forward(self, values: Tensor) -> Tensor:
        return values + self.mask


@pytest.mark.parametrize("runtime", installed_runtimes())
def test_an_exported_mask_is_stored_as_int8(runtime, tmp_path):
    values = torch.randn(3, 4, 16, 16)
    file = export(Masked(), values, tmp_path / "model.onnx")
    assert file.stat().st_size < 4 * 16 * 16 * 2
    assert np.array_equal(open_session(file, runtime).infer(values.numpy()), (values + Masked().mask).numpy())
