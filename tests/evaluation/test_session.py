from __future__ import annotations

import ctypes
import gc
import json
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tersor.core.errors import InputError
from tersor.core.inputs import Inputs
from tersor.core.machine import default_threads, machine
from tersor.evaluation import session as runtime_module
from tersor.evaluation.node_profile import node_times
from tersor.evaluation.session import RUNTIMES, installed_runtimes, open_session

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
runtimes = pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])


@runtimes
def test_a_session_returns_the_networks_logits(tiny, runtime):
    session = open_session(tiny.path, runtime, precision="float32", threads=2)

    np.testing.assert_allclose(session.run(tiny.images), tiny.logits, rtol=1e-4, atol=1e-5)
    assert (session.runtime, session.precision, session.threads) == (runtime, "float32", 2)
    assert session.input_dtype == np.float32
    assert session.input_shape == (None, 3, 8, 8)


@runtimes
def test_logits_are_not_overwritten_by_the_next_run(tiny, runtime):
    session = open_session(tiny.path, runtime)
    first = session.run(tiny.images)
    before = first.copy()
    session.run(-tiny.images)
    np.testing.assert_array_equal(first, before)


@runtimes
def test_images_that_are_not_contiguous_are_read_correctly(tiny, runtime):
    session = open_session(tiny.path, runtime, precision="float32")
    flipped = tiny.images[:, :, ::-1, ::-1]  # the tiny network ignores positions
    np.testing.assert_allclose(session.run(flipped), tiny.logits, rtol=1e-4, atol=1e-5)


@needs_openvino
def test_an_openvino_xml_is_read_with_its_weights(tiny):
    openvino = pytest.importorskip("openvino")
    xml = tiny.path.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(tiny.path), xml, compress_to_fp16=False)
    session = open_session(xml, "openvino", precision="float32")
    np.testing.assert_allclose(session.run(tiny.images), tiny.logits, rtol=1e-4, atol=1e-5)

    xml.with_suffix(".bin").unlink()
    with pytest.raises(InputError, match=r"cannot read .*tiny\.xml.*bin file"):
        open_session(xml, "openvino")


def executed(openvino, config, path):
    """Precisions of the matrix products in the compiled network, as reported by the runtime."""
    compiled = openvino.Core().compile_model(path, "CPU", config)
    layers = [layer.get_rt_info() for layer in compiled.get_runtime_model().get_ops()]
    return {layer["runtimePrecision"] for layer in layers if layer["layerType"] in {"Convolution", "FullyConnected"}}


@needs_openvino
@pytest.mark.parametrize("precision", [None, "float32"])
def test_the_reported_precision_is_the_executed_precision(tiny, precision):
    openvino = pytest.importorskip("openvino")
    session = open_session(tiny.path, "openvino", precision=precision)
    layers = executed(openvino, {"INFERENCE_PRECISION_HINT": "f32"} if precision else {}, tiny.path)
    assert layers == {{"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[session.precision]}
    if precision:
        assert session.precision == precision
        np.testing.assert_allclose(session.run(tiny.images), tiny.logits, rtol=1e-4, atol=1e-5)


@needs_openvino
@pytest.mark.parametrize(
    ("products", "precision"),
    [
        ({"Convolution": "f32", "FullyConnected": "f32"}, "float32"),
        ({"Convolution": "u8", "FullyConnected": "bf16"}, "bfloat16"),
        ({"Convolution": "u8", "Softmax": "f32"}, "float16"),
    ],
    ids=["all in float", "one in float", "none in float"],
)
def test_the_precision_of_openvino_is_that_of_the_float_products(products, precision):
    operators = [{"layerType": kind, "runtimePrecision": executed} for kind, executed in products.items()]
    model = SimpleNamespace(
        get_runtime_model=lambda: SimpleNamespace(
            get_ops=lambda: [SimpleNamespace(get_rt_info=lambda each=each: each) for each in operators]
        ),
        get_property=lambda _name: SimpleNamespace(get_type_name=lambda: "f16"),
    )
    assert runtime_module._openvino_precision(model) == precision


@runtimes
def test_a_precision_other_than_float32_raises(tiny, runtime):
    with pytest.raises(InputError, match=r"precision is 'bfloat16'\. Possible: 'float32'"):
        open_session(tiny.path, runtime, precision="bfloat16")


def test_installed_runtimes_can_be_imported(monkeypatch):
    assert "onnxruntime" in installed_runtimes()
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert installed_runtimes() == ["onnxruntime"]


@runtimes
@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"", "is empty"), (b"not a network" * 50, "cannot read|damaged or not an ONNX file"), (b"\x08\x0a", "network")],
    ids=["empty", "text", "no graph"],
)
def test_a_file_that_is_not_a_network_raises(tmp_path, capfd, runtime, contents, message):
    path = tmp_path / "broken.onnx"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=message) as refusal:
        open_session(path, runtime)
    assert "broken.onnx" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    printed = capfd.readouterr()
    assert not printed.out + printed.err, "only our message, not the runtime's own"


@runtimes
def test_a_truncated_file_raises(tiny, runtime):
    whole = tiny.path.read_bytes()
    tiny.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot read|tiny\.onnx is damaged or not an ONNX file"):
        open_session(tiny.path, runtime)


@runtimes
def test_an_unknown_operator_raises(tmp_path, runtime):
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8])  # noqa: E731
    graph = helper.make_graph([helper.make_node("Wish", ["x"], ["y"])], "g", [value("x")], [value("y")])
    path = tmp_path / "wish.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(InputError, match="cannot read"):
        open_session(path, runtime)


@runtimes
def test_two_inputs_can_be_passed_by_position_or_by_name(tmp_path, runtime):
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])  # noqa: E731
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "g", [value("a"), value("b")], [value("c")])
    path = tmp_path / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    session = open_session(path, runtime)
    one, two = np.ones((2, 4), np.float32), np.full((2, 4), 2, np.float32)
    for arrays in (Inputs((one, two)), Inputs({"b": two, "a": one})):
        assert (session.run(arrays) == 3).all()
    with pytest.raises(InputError, match="takes the inputs a, b, but a, c were given"):
        session.run(Inputs({"a": one, "c": two}))
    with pytest.raises(InputError, match=r"of shape \(any, 4\) as b, but the input is float32 of shape \(2, 3\)"):
        session.run(Inputs((one, two[:, :3])))


def test_unusable_paths_raise(tiny):
    with pytest.raises(InputError, match=r"there is no file .*absent\.onnx"):
        open_session(tiny.path.with_name("absent.onnx"), "onnxruntime")
    with pytest.raises(InputError, match="is not a file"):
        open_session(tiny.path.parent, "onnxruntime")
    text = tiny.path.with_name("numbers.json")
    text.write_text("{}")
    with pytest.raises(InputError, match=r"onnxruntime reads \.onnx files"):
        open_session(text, "onnxruntime")


def test_unknown_names_raise(tiny):
    with pytest.raises(InputError, match="Did you mean 'onnxruntime'"):
        open_session(tiny.path, "onnx-runtime")
    with pytest.raises(InputError, match="precision is 'int8'"):
        open_session(tiny.path, "onnxruntime", precision="int8")
    with pytest.raises(InputError, match="at least 1; 0"):
        open_session(tiny.path, "onnxruntime", threads=0)


def test_the_error_for_a_missing_runtime_explains_how_to_install_it(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="pip install openvino"):
        open_session(tiny.path, "openvino")


@runtimes
@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 3, 8, 8)), np.zeros((2, 3, 9, 8), np.float32), np.zeros((3, 8, 8), np.float32)],
    ids=["float64", "size", "no batch"],
)
def test_images_with_the_wrong_shape_or_dtype_raise(tiny, runtime, images):
    with pytest.raises(InputError, match=r"takes float32 of shape \(any, 3, 8, 8\)"):
        open_session(tiny.path, runtime).run(images)


@pytest.mark.parametrize("variable", ["1", "1,4"])
def test_omp_num_threads_limits_the_threads(monkeypatch, variable):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert default_threads() == 1


@pytest.mark.parametrize("variable", ["", "0", "many", "100000"])
def test_invalid_or_large_omp_num_threads_do_not_exceed_the_number_of_cores(monkeypatch, variable):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = default_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert default_threads() == cores >= 1


def test_machine_describes_the_hardware_without_personal_data():
    described = machine()
    assert described["cpu"]
    assert described["cores"] >= described["threads"] >= 1
    assert set(described["versions"]) == {*RUNTIMES, "torch"}
    text = json.dumps(described)
    assert platform.node() not in text or len(platform.node()) < 3  # a host named "vm" is in any text
    assert str(Path.home()) not in text


@pytest.mark.skipif(sys.platform != "linux", reason="uses the C library of Linux")
@runtimes
def test_models_leave_no_freed_signal_stack_in_the_main_thread(tiny, runtime):
    """With a freed signal stack, the next Ctrl-C causes a segmentation fault."""

    class Stack(ctypes.Structure):
        _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    def place():
        stack = Stack()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
        return stack.place

    before = place()
    first, second = (open_session(tiny.path, runtime) for _ in range(2))
    first.run(tiny.images)
    del first
    node_times(tiny.path, runtime, tiny.images, runs=1)
    del second
    gc.collect()
    assert place() in {before, None}
