"""Names, channels and bits of the layers in an exported file."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import tersor
from tersor.core.errors import CompressionWarning, InputError
from tersor.deploy.file_layers import FileLayer, file_layers, stored_precision, weight_bits


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 7, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5)),
    ).eval()


def test_layers_of_a_float_file(tmp_path):
    tersor.export(network(), torch.randn(2, 3, 8, 8), tmp_path / "float.onnx")
    layers = file_layers(tmp_path / "float.onnx")
    assert layers[:2] == [FileLayer("0", 8, 32), FileLayer("2", 6, 32)]
    assert [(each.channels, each.bits) for each in layers] == [(8, 32), (6, 32), (7, 32), (5, 32)]


def test_layers_of_8_and_4_bit_files(tmp_path):
    images = torch.randn(8, 3, 8, 8)
    for bits in (8, 4):
        with pytest.warns(CompressionWarning, match="ConvTranspose2d"):
            quantized = tersor.quantize(network(), images, bits=bits)
        tersor.export(quantized, images[:2], tmp_path / f"{bits}.onnx")
        layers = file_layers(tmp_path / f"{bits}.onnx")
        assert [(each.channels, each.bits) for each in layers] == [(8, 8), (6, bits), (7, 32), (5, 8)]


def test_weights_of_matrix_products_in_a_file(tmp_path):
    """A Gemm in both orientations, a product after a conversion, one with a computed operand, and an unknown type."""
    weights = {"rows": (5, 4), "columns": (5, 3), "half": (3, 6), "double": (6, 2)}
    kinds = {"half": np.float16, "double": np.float64}
    stored = [numpy_helper.from_array(np.zeros(s, kinds.get(n, np.float32)), n) for n, s in weights.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "rows"], ["a"], name="first", transB=1),
        helper.make_node("Gemm", ["a", "columns"], ["b"], name="second", transB=0),
        helper.make_node("Cast", ["half"], ["h"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", ["b", "h"], ["c"]),
        helper.make_node("Relu", ["double"], ["r"]),
        helper.make_node("MatMul", ["c", "r"], ["d"], name="computed"),
        helper.make_node("MatMul", ["d", "double"], ["y"], name="last"),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], stored)), tmp_path / "model.onnx")
    assert file_layers(tmp_path / "model.onnx") == [
        FileLayer("first", 5, 32),
        FileLayer("second", 3, 32),
        FileLayer("c", 6, 16),
        FileLayer("last", 2, 32),
    ]


def test_weights_of_integer_operators(tmp_path):
    """As written by ONNX Runtime's own quantization: the weight of `QLinear` operators is their fourth input."""
    stored = [numpy_helper.from_array(np.zeros((6, 3, 1, 1), np.int8), "kernel")]
    stored.append(numpy_helper.from_array(np.zeros((6, 5), np.uint8), "matrix"))
    nodes = [
        helper.make_node("QLinearConv", ["x", "s", "z", "kernel", "s", "z", "s", "z"], ["a"], name="conv"),
        helper.make_node("MatMulInteger", ["a", "matrix"], ["y"], name="product"),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], stored)), tmp_path / "model.onnx")
    assert file_layers(tmp_path / "model.onnx") == [FileLayer("conv", 6, 8), FileLayer("product", 5, 8)]
    assert stored_precision(tmp_path / "model.onnx", "bfloat16") == "int8"


def test_integer_constants_of_an_openvino_file(tmp_path):
    layer = '<layer type="{}"><data element_type="{}"/></layer>'
    for name, types in {"quantized": ("f32", "i8", "u4", "i64"), "float": ("f32", "i64")}.items():
        layers = "".join(layer.format("Const", each) for each in types)
        (tmp_path / f"{name}.xml").write_text(f"<net><layers><layer/>{layers}</layers></net>")
    assert weight_bits(tmp_path / "quantized.xml") == (4, 8)
    assert stored_precision(tmp_path / "float.xml", "bfloat16") == "bfloat16"


def test_a_damaged_file_raises(tmp_path):
    (tmp_path / "text.onnx").write_text("no graph" * 50)
    with pytest.raises(InputError, match=r"text\.onnx is damaged or not an ONNX file"):
        file_layers(tmp_path / "text.onnx")


def quantized_layer(path, *, before):
    """A matrix product with int8 weights. `before` is an operator between the dequantized input and the product."""
    stored = [numpy_helper.from_array(np.zeros((6, 5), np.int8), "stored")]
    stored.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    nodes = [
        helper.make_node("DequantizeLinear", ["stored", "scale"], ["weight"]),
        helper.make_node("DequantizeLinear", ["x", "scale"], ["values"]),
        helper.make_node(before, ["values"], ["input"]),
        helper.make_node("MatMul", ["input", "weight"], ["y"]),
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], stored)), path)


@pytest.mark.parametrize(("before", "precision"), [("Flatten", "int8"), ("Exp", "int8, rest float32")])
def test_precision_mentions_float32_if_a_product_has_a_float_operand(before, precision, tmp_path):
    quantized_layer(tmp_path / "model.onnx", before=before)
    assert stored_precision(tmp_path / "model.onnx", "float32") == precision
