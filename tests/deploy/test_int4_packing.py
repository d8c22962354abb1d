from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tersor.deploy.int4_packing import pack_int4


def dequantized(integers: np.ndarray) -> onnx.ModelProto:
    """A network without inputs that returns `integers` as floats."""
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["shown"], axis=0)],
        "weights",
        [],
        [helper.make_tensor_value_info("shown", TensorProto.FLOAT, integers.shape)],
        [
            numpy_helper.from_array(integers, "weight"),
            numpy_helper.from_array(np.ones(len(integers), np.float32), "scale"),
            numpy_helper.from_array(np.zeros(len(integers), integers.dtype), "zero"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def shown(proto: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {})[0]


def packed(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.INT4}


@given(
    st.lists(st.tuples(st.integers(-128, 127), st.integers(0, 15)), min_size=1, max_size=4),
    st.sampled_from([(1,), (5,), (3, 3, 3)]),
    st.integers(0, 2**32 - 1),
)
@example([(-8, 15)], (16,), 0)
@example([(-8, 15), (-9, 1)], (3, 3, 3), 0)
@example([(127, 0), (-128, 15)], (5,), 0)
@settings(max_examples=60)
def test_weights_that_fit_into_16_consecutive_integers_are_packed_losslessly(channels, shape, seed):
    draw = np.random.default_rng(seed)
    integers = np.stack([draw.integers(low, min(low + span, 127) + 1, shape) for low, span in channels]).astype(np.int8)
    proto = dequantized(integers)
    pack_int4(proto.graph)
    (tensor,) = packed(proto).values()
    assert len(tensor.raw_data) == (integers.size + 1) // 2
    np.testing.assert_array_equal(shown(proto), integers)
    centred = integers.min() >= -8 and integers.max() <= 7
    assert [node.op_type for node in proto.graph.node][:-1] == (["Cast"] if centred else ["Cast", "Add"])


@pytest.mark.parametrize(
    "integers",
    [np.array([[0, 0], [-8, 8]], np.int8), np.array([[0, 1], [2, 3]], np.int32), np.array([[0, 1], [2, 3]], np.uint8)],
    ids=["17 neighbours", "int32", "uint8"],
)
def test_other_tensors_are_not_packed(integers):
    proto = dequantized(integers)
    before = proto.SerializeToString()
    pack_int4(proto.graph)
    assert proto.SerializeToString() == before


def test_zero_points_are_not_packed():
    proto = dequantized(np.zeros((3, 2), np.int8))
    pack_int4(proto.graph)
    assert list(packed(proto)) == ["weight.int4"]


def test_a_weight_shared_by_two_layers_is_packed_once():
    proto = dequantized(np.arange(-8, 8, dtype=np.int8).reshape(4, 4))
    proto.graph.node.append(helper.make_node("DequantizeLinear", ["weight", "scale"], ["again"], axis=0))
    proto.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, (4, 4)))
    pack_int4(proto.graph)
    assert len(packed(proto)) == 1
    np.testing.assert_array_equal(shown(proto), np.arange(-8, 8).reshape(4, 4))
