"""Only the quantizers with which OpenVINO cannot read a file, or computes wrong outputs, are removed from it."""

from collections import Counter
from dataclasses import replace

import onnx
import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import CompressionWarning, InputError
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation import unsupported_quantizers
from tersor.evaluation.session import open_session
from tersor.evaluation.unsupported_quantizers import remove_unsupported_quantizers
from tersor.evaluation.verification import verify
from tersor.methods.ptq import PTQ
from tersor.training.context import AttachContext

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """Concatenates the tokens of two convolutions and applies a fully connected layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 1)
        self.mixed, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, images):
        features = self.first(images)
        parts = [each.flatten(2).transpose(1, 2) for each in (features, self.second(features))]
        return self.head(self.mixed(torch.cat(parts, 1)).mean(1))


@pytest.fixture(scope="module")
def quantized():
    attached = PTQ().attach(Tokens().eval(), AttachContext(data=[IMAGES], target=Target(runtime="openvino")))
    attached.begin()
    return attached.model.eval()


@pytest.fixture
def file(quantized, tmp_path):
    return export(quantized, IMAGES, tmp_path / "model.onnx")


def quantizers(file):
    return Counter(node.op_type for node in onnx.load(file).graph.node)["QuantizeLinear"]


def quantized_before_a_matrix_product(path):
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    inputs = [made_by.get(node.input[0]) for node in graph.node if node.op_type == "MatMul"]
    return any(node is not None and node.op_type == "DequantizeLinear" for node in inputs)


def unreadable(path, runtime, **_):
    """Replaces `open_session`: OpenVINO cannot read a file with a quantizer in front of a matrix product."""
    if runtime == "openvino" and quantized_before_a_matrix_product(path):
        raise InputError("it cannot be read")
    return open_session(path, "onnxruntime")


def miscalculated(path, runtime, **_):
    """Replaces `open_session`: OpenVINO shifts the outputs of a file with a quantizer in front of a matrix product."""
    session = open_session(path, "onnxruntime")
    if runtime == "openvino" and quantized_before_a_matrix_product(path):
        return replace(session, infer_all=lambda arrays: [session.infer(arrays) + 1])
    return session


def unreadable_or_wrong(path, runtime, **_):
    """Replaces `open_session`: as `unreadable`, and all other files are computed incorrectly."""
    session = unreadable(path, runtime)
    return session if runtime == "onnxruntime" else replace(session, infer_all=lambda x: [session.infer(x) + 1])


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (unreadable, "cannot read"),
        (unreadable_or_wrong, "cannot read"),
        (miscalculated, "computes wrong outputs for"),
    ],
)
def test_only_unsupported_quantizers_are_removed(replaced, message, file, quantized, monkeypatch):
    before = quantizers(file)
    monkeypatch.setattr(unsupported_quantizers, "open_session", replaced)
    with pytest.warns(
        CompressionWarning,
        match=f"openvino {message} .* quantizers: 1 of {before}, at the inputs of operators of type MatMul",
    ):
        remove_unsupported_quantizers(file, "openvino", IMAGES)
    assert quantizers(file) == before - 1
    onnx.checker.check_model(str(file), full_check=True)
    verify(open_session(file, "onnxruntime"), quantized, IMAGES)
    written = {each.name for each in onnx.load(file).graph.initializer}
    assert written == {name for node in onnx.load(file).graph.node for name in node.input if name in written}


@pytest.mark.filterwarnings("error")
def test_a_file_whose_outputs_differ_only_because_of_bfloat16_is_not_changed(file, monkeypatch):
    def rough(path, runtime, precision=None):
        session = miscalculated(path, runtime)
        right = runtime == "onnxruntime" or precision == "float32"
        return open_session(path, "onnxruntime") if right else replace(session, precision="bfloat16")

    content = file.read_bytes()
    monkeypatch.setattr(unsupported_quantizers, "open_session", rough)
    remove_unsupported_quantizers(file, "openvino", IMAGES)
    assert file.read_bytes() == content


def test_a_file_with_activations_of_few_bits_is_not_compared(tmp_path):
    context = AttachContext(data=[IMAGES], target=Target(runtime="openvino"))
    for bits, compared in ((8, True), (4, False)):
        attached = PTQ(activation_bits=bits).attach(Tokens().eval(), context)
        attached.begin()
        graph = onnx.load(export(attached.model.eval(), IMAGES, tmp_path / f"{bits}.onnx")).graph
        found = list(unsupported_quantizers._quantizers(graph))
        assert unsupported_quantizers._complete(graph, found) is compared


@pytest.mark.filterwarnings("error")
def test_a_file_that_is_wrong_without_quantizers_too_is_not_changed(file, monkeypatch):
    content = file.read_bytes()
    session = open_session(file, "onnxruntime")
    wrong = replace(session, infer_all=lambda arrays: [session.infer(arrays) + 1])
    sessions = {"openvino": wrong, "onnxruntime": session}
    monkeypatch.setattr(unsupported_quantizers, "open_session", lambda _, runtime, **__: sessions[runtime])
    remove_unsupported_quantizers(file, "openvino", IMAGES)
    assert file.read_bytes() == content


@pytest.mark.filterwarnings("error")
def test_a_readable_file_is_not_changed(file):
    content = file.read_bytes()
    remove_unsupported_quantizers(file, "onnxruntime", IMAGES)
    assert file.read_bytes() == content


@pytest.mark.filterwarnings("error")
def test_a_file_that_is_unreadable_for_another_reason_is_not_changed(file):
    proto = onnx.load(file)
    proto.graph.node[-1].op_type = "Gelatine"
    onnx.save(proto, file)
    content = file.read_bytes()
    remove_unsupported_quantizers(file, "openvino", IMAGES)
    assert file.read_bytes() == content


def test_export_writes_a_file_that_openvino_can_read(file, tmp_path):
    try:
        open_session(file, "openvino")
    except InputError:
        pass
    else:
        pytest.skip("OpenVINO reads the file with all quantizers on this processor")
    model = tersor.quantize(Tokens().eval(), [IMAGES], runtime="openvino")
    with pytest.warns(CompressionWarning) as issued:
        file = tersor.export(model, IMAGES, tmp_path / "model.onnx", runtime="openvino")
    assert any(
        "openvino cannot read this network if all activations are quantized" in str(each.message) for each in issued
    )
    assert open_session(file, "openvino").outputs


class Padded(nn.Module):
    """Pads one dimension of signed values; quantized for ONNX Runtime, OpenVINO pads them with a wrong number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        return self.head(self.second(nn.functional.pad(self.first(images), (1, 1, 0, 0))).mean((2, 3)))


def test_export_writes_a_file_whose_outputs_are_right_in_openvino(tmp_path):
    model = tersor.quantize(Padded().eval(), [IMAGES])
    expected, quantized = Padded().eval()(IMAGES), export(model, IMAGES, tmp_path / "quantized.onnx")
    errors = [
        float((torch.from_numpy(open_session(quantized, runtime).run(IMAGES.numpy())) - expected).norm())
        for runtime in ("onnxruntime", "openvino")
    ]
    if errors[1] < 2 * errors[0]:
        pytest.skip("OpenVINO computes the file correctly on this processor")
    with pytest.warns(CompressionWarning) as issued:
        file = tersor.export(model, IMAGES, tmp_path / "model.onnx", runtime="openvino")
    assert any("openvino computes wrong outputs for this network" in str(each.message) for each in issued)
    repaired = torch.from_numpy(open_session(file, "openvino").run(IMAGES.numpy()))
    assert float((repaired - expected).norm()) < 2 * errors[0]
