from __future__ import annotations

import copy
import json
import os
import re
import stat
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from onnx import TensorProto, numpy_helper
from torch import nn

import tersor
from tersor.core.errors import CompressionWarning, InputError
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation.session import load_runtime, open_session, openvino_compiled, openvino_config
from tersor.methods.ptq import PTQ
from tersor.models import build
from tersor.training.context import AttachContext

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
runtimes = pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])

CLASSES = ("a", "ä", 'quote"')
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MATRIX_PRODUCTS = {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}


class Small(nn.Module):
    """Residual, grouped and dilated convolutions, dropout, a negative gamma and a gamma of zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=2, groups=2, dilation=2), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(12, 3)
        for norm in (self.bn1, self.bn2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.weight.data[0] = 0
        nn.init.normal_(self.linear.weight)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(x + self.bn2(self.conv2(x))), 2)
        return self.linear(self.drop(F.relu(self.conv3(x)).mean((2, 3))))


def images(count=32, size=8, seed=1):
    """Images that differ in color and contrast, so that the outputs differ."""
    draw = torch.Generator().manual_seed(seed)
    colour = torch.randn(count, 3, 1, 1, generator=draw)
    return colour + torch.rand(count, 1, 1, 1, generator=draw) * torch.randn(count, 3, size, size, generator=draw)


def quantize(model, x, runtime="onnxruntime", **options):
    attached = PTQ(**options).attach(model.eval(), AttachContext(data=[x], target=Target(runtime=runtime)))
    attached.begin()
    return attached.model.eval()


def outputs_of(model, x):
    with torch.inference_mode():
        return model(x).numpy()


def run(path, x, runtime="onnxruntime"):
    return open_session(path, runtime, precision="float32").run(np.ascontiguousarray(x))


def initializers(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def executed(path, folder):
    """The operators that ONNX Runtime runs after its own optimization."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The quantized network, and its file for each runtime."""
    folder = tmp_path_factory.mktemp("small")
    graphs = {runtime: quantize(Small(), images(), runtime) for runtime in ("onnxruntime", "openvino")}
    paths = {
        runtime: export(graph, images(), folder / f"{runtime}.onnx", classes=CLASSES)
        for runtime, graph in graphs.items()
    }
    return graphs, paths


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The float network, which was in training mode when it was exported, and its file."""
    model = Small().train()
    path = export(model, images(), tmp_path_factory.mktemp("plain") / "m.onnx")
    assert model.training
    return model.eval(), path


@pytest.fixture(scope="module")
def pixels(small, plain, tmp_path_factory):
    """Both networks, and their files that take pixels as input."""
    folder = tmp_path_factory.mktemp("pixels")
    models = {"quantized": small[0]["onnxruntime"], "plain": plain[0]}
    paths = {
        name: export(model, images(), folder / f"{name}.onnx", pixels=(MEAN, STD)) for name, model in models.items()
    }
    return models, paths


@runtimes
@pytest.mark.parametrize("count", [1, 3, 7, 32])
def test_the_file_agrees_with_torch_at_any_batch_size(small, runtime, count):
    graphs, paths = small
    x = images(count)
    expected = outputs_of(graphs[runtime], x)
    found = run(paths[runtime], x.numpy(), runtime)
    assert found.shape == (count, 3)
    # a value near the middle of two grid points can be rounded either way
    assert np.abs(found - expected).max() < 0.1 * expected.std()
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.95


def test_weights_are_stored_as_int8_and_biases_as_int32(small):
    _, paths = small
    tensors = initializers(paths["onnxruntime"])
    shapes = Counter(array.shape for array in tensors.values() if array.dtype == np.int8 and array.ndim > 1)
    assert shapes == Counter([(8, 3, 3, 3), (8, 4, 3, 3), (12, 8, 3, 3), (3, 12)])
    assert sorted(a.shape for a in tensors.values() if a.dtype == np.int32) == [(3,), (8,), (8,), (12,)]
    assert all(a.ndim <= 1 for a in tensors.values() if a.dtype == np.float32), "no weight is left in float"
    assert all(a.min() >= -127 for a in tensors.values() if a.dtype == np.int8)
    values = onnx.load(paths["onnxruntime"]).graph
    assert {node.op_type for node in values.node} >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    assert "BatchNormalization" not in {node.op_type for node in values.node}


def test_onnxruntime_computes_every_layer_in_integers(small, tmp_path):
    _, paths = small
    operators = executed(paths["onnxruntime"], tmp_path)
    assert operators["QLinearConv"] == 3
    assert not MATRIX_PRODUCTS & set(operators)


def test_the_metadata_contains_only_the_classes_and_the_runtime(small):
    _, paths = small
    proto = onnx.load(paths["onnxruntime"])
    stored = {entry.key: entry.value for entry in proto.metadata_props}
    assert stored.keys() == {"classes", "runtime"}
    assert (json.loads(stored["classes"]), json.loads(stored["runtime"])) == (list(CLASSES), "onnxruntime")
    assert not proto.functions
    assert not proto.graph.value_info
    for part in [proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.input]:
        assert not part.doc_string
    for part in [proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output]:
        assert not part.metadata_props
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["images", "logits"]
    assert (proto.producer_name, proto.producer_version) == ("tersor", "")


def texts(path):
    """All readable text in the file."""
    return [match.decode() for match in re.findall(rb"[\x20-\x7e]{5,}", path.read_bytes())]


def test_the_file_does_not_describe_this_machine(small, plain, pixels):
    secrets = {str(Path.cwd()), str(Path.home()), sys.prefix, str(plain[1].parent), os.uname().nodename}
    for path in [*small[1].values(), plain[1], *pixels[1].values()]:
        for text in texts(path):
            assert not re.search(r"/src|site-packages|torch|\.py\b|Traceback|File \"", text), text
            assert not any(secret in text for secret in secrets if len(secret) > 3), text


def test_operators_have_the_names_of_their_layers(small, pixels):
    for path in (*small[1].values(), pixels[1]["quantized"]):
        names = [node.name for node in onnx.load(path).graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}]
        assert names == ["conv1", "conv2", "conv3", "linear"]


def test_exporting_the_same_network_twice_writes_identical_files(small, tmp_path):
    graphs, paths = small
    again = export(graphs["onnxruntime"], images(5, seed=9), tmp_path / "again.onnx", classes=CLASSES)
    assert again.read_bytes() == paths["onnxruntime"].read_bytes()


def test_the_opset_and_the_ir_version_support_older_runtimes(small):
    proto = onnx.load(small[1]["onnxruntime"])
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 21)]
    assert proto.ir_version == 10


def test_export_does_not_change_the_network(tmp_path):
    graph = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()), images())
    expected = outputs_of(graph, images())
    graph.train()
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    modes = {key: module.training for key, module in graph.named_modules()}
    export(graph, images(), tmp_path / "m.onnx")
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())
    assert {key: module.training for key, module in graph.named_modules()} == modes
    np.testing.assert_array_equal(outputs_of(graph.eval(), images()), expected)


@runtimes
def test_a_float_network_is_exported_in_float(plain, runtime):
    model, path = plain
    np.testing.assert_allclose(run(path, images().numpy(), runtime), outputs_of(model, images()), rtol=1e-3, atol=1e-4)


@runtimes
@pytest.mark.parametrize("kind", ["quantized", "plain"])
def test_uint8_pixels_give_the_same_outputs_as_normalized_images(pixels, runtime, kind):
    x = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shape = (1, 3, 1, 1)
    normalised = (x / 255 - torch.tensor(MEAN).reshape(shape)) / torch.tensor(STD).reshape(shape)
    models, paths = pixels
    found = run(paths[kind], x.numpy(), runtime)
    expected = outputs_of(models[kind], normalised)
    assert np.abs(found - expected).max() < (1e-4 if kind == "plain" else 0.05) * expected.std()
    assert onnx.load(paths[kind]).graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8


@pytest.mark.parametrize("bits", [(8, 4), (2, 6)], ids=str)
def test_low_bit_files_agree_with_torch_outside_the_calibrated_range(tmp_path, bits):
    graph = quantize(Small(), images(), bits=bits[0], activation_bits=bits[1])
    path = export(graph, images(), tmp_path / "m.onnx")
    for factor in (1, 10):
        expected = outputs_of(graph, images() * factor)
        found = run(path, (images() * factor).numpy())
        difference = np.abs(found - expected)
        # the bias is rounded to the grid of the products, which is as coarse as the bits are few
        assert np.median(difference) < 0.1 * expected.std()
    assert executed(path, tmp_path)["QLinearConv"] == 3, "clipped as integers, not before them"
    packed = Counter(t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) > 1)
    assert packed == ({TensorProto.INT4: 2, TensorProto.INT8: 2} if bits[0] == 2 else {TensorProto.INT8: 4})


def computed_by_openvino(path, x):
    """The kernels with which OpenVINO computes convolutions and matrix products."""
    openvino = load_runtime("openvino")
    config = openvino_config("float32", 1) | {"PERF_COUNT": True}
    request = openvino_compiled(openvino, str(path), config).create_infer_request()
    request.infer([x])
    nodes = request.get_profiling_info()
    return [node.exec_type for node in nodes if node.node_type.startswith(("Convolution", "FullyConnected"))]


@runtimes
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
def test_packed_weights_give_the_same_outputs_as_unpacked_weights(
    on_affine_grids, tmp_path, monkeypatch, runtime, affine
):
    graph, x = quantize(Small(), images(), runtime, bits=4, first_last_bits=4), images().numpy()
    if affine:
        on_affine_grids(graph, 4, per_tensor=False)
    module, unpacked = sys.modules["tersor.deploy.onnx"], []
    pack = module.pack_int4
    monkeypatch.setattr(module, "pack_int4", lambda graph: (unpacked.append(copy.deepcopy(graph)), pack(graph)))
    path, bytewise = export(graph, images(), tmp_path / "packed.onnx"), tmp_path / "bytewise.onnx"
    proto = onnx.load(path)
    assert sum(t.data_type == TensorProto.INT4 for t in proto.graph.initializer) == 4
    proto.graph.CopyFrom(unpacked[0])
    onnx.save(proto, bytewise)
    np.testing.assert_array_equal(run(path, x, runtime), run(bytewise, x, runtime))
    if runtime == "openvino":
        kernels = computed_by_openvino(path, x)
        assert kernels
        assert all(kernel.endswith("I8") for kernel in kernels)
    else:
        assert executed(path, tmp_path) == executed(bytewise, tmp_path)


@runtimes
@pytest.mark.parametrize("per_tensor", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["channel", "tensor"])
@pytest.mark.parametrize("bits", [pytest.param(7, marks=pytest.mark.slow), 5])  # grids of 8 bits are symmetric
@pytest.mark.parametrize("kind", ["small", "perceptron"])
def test_files_with_affine_weights_agree_with_torch(on_affine_grids, tmp_path, runtime, per_tensor, bits, kind):
    graph = quantize({"small": Small, "perceptron": Perceptron}[kind](), images(), runtime)
    on_affine_grids(graph, bits, per_tensor=per_tensor, runs=True)
    path = export(graph, images(), tmp_path / "m.onnx")
    expected = outputs_of(graph, images())
    assert np.abs(run(path, images().numpy(), runtime) - expected).max() < 0.1 * expected.std()
    if runtime == "onnxruntime":  # before 1.27 it refused zero points that differ
        operators = executed(path, tmp_path)
        assert (operators["QLinearConv"], operators["QGemm"]) == ((3, 1) if kind == "small" else (0, 2))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.second.running_var.fill_(9.0)

    def forward(self, x):
        return self.second(self.layer(F.relu(self.first(self.layer(x))))).mean((2, 3))


class Perceptron(nn.Module):
    """Fully connected layers with a norm between them, and an attention layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(3, 16), nn.BatchNorm1d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 4)
        self.norm.running_mean.normal_()
        nn.init.uniform_(self.norm.weight, -2, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x.mean((2, 3))))).unsqueeze(1)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.last(F.dropout((x + y).squeeze(1), training=self.training))


class Mirrored(nn.Module):
    """The convolution itself does the padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, padding=2, padding_mode="reflect")

    def forward(self, x):
        return self.second(F.relu(self.first(x))).mean((2, 3))


class Split(nn.Module):
    """Channels are split, shuffled and concatenated; the output is an average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.side, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, 1)
        y = torch.cat((left, F.relu(self.side(right))), 1)
        n, _, h, w = y.shape
        y = F.pad(y.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w), (1, 1, 1, 1), value=2.0)
        return torch.flatten(F.adaptive_avg_pool2d(self.last(y), 1), 1)


class Attends(nn.Module):
    """Attention heads with a learned bias table, as in BEiT."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.heads, self.last = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 5)
        self.table = nn.Parameter(torch.randn(4, 4, 2))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, pixels, width = x.shape
        queries, keys, values = self.heads(x).reshape(n, pixels, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        shift = self.table.permute(2, 0, 1).contiguous().unsqueeze(0)
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=shift)
        return self.last(y.transpose(1, 2).reshape(n, pixels, width).mean(1))


@pytest.mark.parametrize("kind", [Twice, Perceptron, Mirrored, Split])
def test_files_of_unusual_networks_agree_with_torch(tmp_path, kind):
    graph = quantize(kind(), images())
    path = export(graph, images(), tmp_path / "m.onnx")
    expected = outputs_of(graph, images())
    for runtime in ("onnxruntime", *(["openvino"] if find_spec("openvino") else [])):
        for count in (1, 7):
            found = run(path, images().numpy()[:count], runtime)
            assert np.abs(found - expected[:count]).max() < 0.1 * expected.std()


def test_the_file_of_attention_with_a_learned_bias_agrees_with_torch(tmp_path):
    network = Attends().eval()
    path = export(network, images(), tmp_path / "m.onnx")
    assert np.abs(run(path, images().numpy(), "onnxruntime") - outputs_of(network, images())).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_networks_of_another_precision_are_exported_in_float32(tmp_path, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    expected = outputs_of(quantize(model, images()), images())
    torch.manual_seed(0)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).to(dtype)
    path = export(tersor.quantize(other, [images().to(dtype)]), images().to(dtype), tmp_path / "m.onnx")
    assert np.abs(run(path, images().numpy()) - expected).max() < 0.2 * expected.std()


@pytest.mark.parametrize(
    "size", [1, *[pytest.param(each, marks=pytest.mark.slow) for each in [(1, 1), [1, 1]]]], ids=str
)
def test_average_pooling_of_channels_last_values_is_one_operator(tmp_path, size):
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 2, 2), nn.LayerNorm(4), nn.AdaptiveAvgPool2d(size)

        def forward(self, x):
            return self.pool(self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).flatten(1)

    model = ChannelsLast()
    path = export(model, images(), tmp_path / "m.onnx")
    assert not {"Gather", "Range"} & {node.op_type for node in onnx.load(path).graph.node}
    np.testing.assert_allclose(run(path, images().numpy()), outputs_of(model, images()), rtol=1e-3, atol=1e-4)


def test_a_pooling_subclass_with_its_own_forward_is_not_rewritten(tmp_path):
    class Squared(nn.AdaptiveAvgPool2d):
        def forward(self, x):
            return super().forward(x.square()).flatten(1)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Squared(1), nn.Linear(4, 2)).eval()
    path = export(model, images(), tmp_path / "m.onnx")
    np.testing.assert_allclose(run(path, images().numpy()), outputs_of(model, images()), rtol=1e-3, atol=1e-4)


def test_excluded_layers_stay_in_float(tmp_path):
    path = export(quantize(Small(), images(), exclude=("conv1", "linear")), images(), tmp_path / "m.onnx")
    dtypes = {array.shape: array.dtype for array in initializers(path).values() if array.ndim > 1}
    assert dtypes[8, 3, 3, 3] == np.float32
    assert dtypes[8, 4, 3, 3] == dtypes[12, 8, 3, 3] == np.int8


@pytest.mark.parametrize(("bits", "size"), [(8, 320_000), pytest.param(4, 160_000, marks=pytest.mark.slow)])
def test_a_quantized_residual_network_runs_entirely_in_integers(tmp_path, bits, size):
    torch.manual_seed(0)
    x = images(8, 32)
    graph = quantize(build("resnet20", 10), x, bits=bits)
    path = export(graph, x, tmp_path / "m.onnx")
    assert path.stat().st_size < size, "269,722 parameters"
    operators = executed(path, tmp_path)
    assert operators["QLinearConv"] == 19
    assert operators["QLinearAdd"] == 9
    assert not MATRIX_PRODUCTS & set(operators)
    assert operators["DequantizeLinear"] == 3, "two shortcuts are padded, and the average is taken, in float"
    expected, found = outputs_of(graph, x), run(path, x.numpy())
    assert np.abs(found - expected).mean() < 0.1 * expected.std()


# writing


def test_the_file_has_default_permissions(small, tmp_path):
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(small[1]["openvino"].stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_an_existing_file_is_replaced_and_no_other_file_remains(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    assert export(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images(), str(path)) == path
    assert onnx.load(path).graph.node
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


class Unconvertible(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x[:, 0])


def test_a_failed_conversion_keeps_the_old_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="the network cannot be converted to ONNX: ") as refusal:
        export(Unconvertible(), images(), path)
    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_unwritable_paths_raise(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*there is no folder .*absent"):
        export(Small(), images(), tmp_path / "absent" / "m.onnx")
    with pytest.raises(InputError, match=r"cannot write .*irectory"):
        export(Small(), images(), tmp_path)
    assert not [file for file in (*tmp_path.iterdir(), *tmp_path.parent.iterdir()) if "partial" in file.name]


# torchvision's networks


def trained(name, x, labels, **options):
    """The network after a few training steps on these images: confident, with matching BatchNorm statistics."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=len(labels), **options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model(x)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "shufflenet_v2_x1_0"],
)
def test_torchvisions_networks_end_to_end(tmp_path, name):
    x, labels = images(12, 64), torch.arange(12)
    graph = quantize(trained(name, x, labels), x)
    expected = outputs_of(graph, x)
    path = export(graph, x, tmp_path / "m.onnx")
    parameters = sum(parameter.numel() for parameter in graph.parameters())
    assert path.stat().st_size < 1.1 * parameters + 300_000
    for runtime in ("onnxruntime", *(["openvino"] if find_spec("openvino") else [])):
        for count in (1, 3, 7, 12):
            found = run(path, x[:count].numpy(), runtime)
            assert (found.argmax(1) != expected[:count].argmax(1)).sum() <= 1
    operators = executed(path, tmp_path)
    assert "Conv" not in operators
    assert "FusedConv" not in operators


@pytest.mark.slow
@needs_openvino
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "swin_t"])
def test_torchvisions_networks_for_openvino(tmp_path, name):
    x, labels = images(12, 64), torch.arange(12)
    graph = quantize(trained(name, x, labels), x, "openvino")
    path = export(graph, x, tmp_path / "m.onnx")
    expected = outputs_of(graph, x)
    for count in (1, 12):
        found = run(path, x[:count].numpy(), "openvino")
        assert (found.argmax(1) != expected[:count].argmax(1)).sum() <= 1


def test_a_wrong_extension_raises_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"the name must end in \.onnx"):
        export(build("resnet20", 10), torch.rand(1, 3, 16, 16), tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_exporter_raises_keyboard_interrupt(tmp_path, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise torch.onnx.OnnxExporterError("module has no attribute 'exc'") from KeyboardInterrupt()

    def failing(*_arguments, **_options):
        raise TypeError("no")

    monkeypatch.setattr(torch.onnx, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(nn.Flatten(), torch.zeros(2, 3, 4, 4), tmp_path / "model.onnx")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: exec("raise TypeError('no')"))
    with pytest.raises(InputError, match="cannot be converted to ONNX: no"):
        export(nn.Flatten(), torch.zeros(2, 3, 4, 4), tmp_path / "model.onnx")


def test_an_exporter_error_after_an_earlier_ctrl_c_does_not_raise_keyboard_interrupt(tmp_path, monkeypatch):
    def failing(*_arguments, **_options):
        raise TypeError("no")

    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(KeyboardInterrupt) as before:
        exec("raise KeyboardInterrupt")
    try:
        raise before.value
    except KeyboardInterrupt:
        with pytest.raises(InputError, match="cannot be converted to ONNX: no"):
            export(nn.Flatten(), torch.zeros(2, 3, 4, 4), tmp_path / "model.onnx")


class WithMeta(nn.Module):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, nn.Linear(4, 2))

    def forward(self, images):
        return next(self.children())(images.flatten(1))


def test_a_submodule_named_meta_raises_and_another_attribute_meta_is_ignored(tmp_path):
    with pytest.raises(
        InputError, match=r"an attribute named 'meta', which is reserved in a captured graph. Rename it"
    ):
        tersor.export(WithMeta("meta").eval(), torch.rand(3, 1, 2, 2), tmp_path / "model.onnx")
    network, images = WithMeta("linear").eval(), torch.rand(3, 1, 2, 2)
    network.meta = None
    file = tersor.export(network, images, tmp_path / "model.onnx", normalization=((0.5,), (0.5,)))
    assert np.allclose(run(file, images.numpy(), "onnxruntime"), network(images).detach(), atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_file_that_no_runtime_can_run_raises_an_input_error(tmp_path, layers):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(48, 16, layers, batch_first=True, proj_size=8)

        def forward(self, x):
            return self.layer(x.transpose(1, 2).flatten(2))[0]

    with pytest.raises(InputError, match=r"cannot run it|wrote an invalid file"):
        tersor.export(Recurrent().eval(), torch.rand(2, 3, 16, 16), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


class Pairs(nn.Module):
    """Processes both halves of the channels as separate images of one batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images):
        features = self.conv(torch.cat([images[:, :3], images[:, 3:]])).relu().mean((2, 3))
        first, second = features.chunk(2)
        return (first - second).abs()


@runtimes
def test_a_batch_size_fixed_by_the_exporter_is_set_to_1_with_a_warning(runtime, tmp_path):
    images = torch.rand(4, 6, 8, 8)
    with pytest.warns(
        CompressionWarning, match=r"the file has a batch size of 1, .* pass batch=\.\.\. to tersor\.export"
    ) as found:
        path = tersor.export(Pairs().eval(), images, tmp_path / "model.onnx", runtime=runtime)
    assert found[0].filename == __file__
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    path = tersor.export(Pairs().eval(), images, tmp_path / "model.onnx", runtime=runtime, batch=4)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


def test_an_operator_without_an_onnx_equivalent_is_named_in_the_error(tmp_path):
    with pytest.raises(InputError, match=r"ONNX has no operator for aten\.rrelu\w*\. Replace the layer"):
        tersor.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.RReLU()).eval(), torch.rand(2, 3, 8, 8), tmp_path / "m.onnx")


def test_a_submodule_named_like_a_python_keyword_raises(tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({"class": nn.Conv2d(3, 4, 3)})

        def forward(self, x):
            return self.heads["class"](x)

    with pytest.raises(InputError, match=r"the name of the submodule heads\.class is a Python keyword"):
        tersor.export(Heads().eval(), torch.rand(2, 3, 8, 8), tmp_path / "m.onnx")
