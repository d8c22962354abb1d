from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tersor.core.errors import InputError
from tersor.evaluation import node_profile
from tersor.evaluation.node_profile import NodeTime, _events, _onnxruntime, layer_of_node, node_times, profile

LAYERS = {"mix": "mix", "norm": "mix", "answer": "answer"}


@pytest.fixture
def named(tiny):
    """The tiny network; its convolution has the name of the BatchNorm that was folded into it."""
    proto = onnx.load(str(tiny.path))
    for node in proto.graph.node:
        node.name = {"Conv": "norm", "Gemm": "answer"}.get(node.op_type, "")
    onnx.save(proto, str(tiny.path))
    return tiny


@pytest.mark.parametrize(
    ("node", "layer"),
    [
        ("layer1.0.conv1_token_12", "layer1.0.conv1"),
        ("layer1.0.conv1/WithoutBiases", "layer1.0.conv1"),
        ("layer1.0.conv1", "layer1.0.conv1"),
        ("layer1.0.conv10", None),
        ("layer1", None),
        ("attention.out.2", "attention.out"),
        ("attention.other", "attention"),
        ("QLinearAdd_200", None),
    ],
)
def test_a_node_is_assigned_to_the_layer_in_its_name(node, layer):
    names = {name: name for name in ("layer1.0.conv1", "attention", "attention.out")}
    assert layer_of_node(node, names) == layer


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_layers_are_found_by_the_node_names_of_the_runtime(named, runtime):
    pytest.importorskip(runtime)
    profiled = profile(named.path, runtime, named.images, LAYERS, precision="float32")
    assert set(profiled["layers"]) == {"mix", "answer"}
    assert profiled["ms"] == pytest.approx(sum(kind["ms"] for kind in profiled["kinds"]))
    assert sum(profiled["layers"].values()) <= profiled["ms"] + 1e-9
    assert profiled["kinds"] == sorted(profiled["kinds"], key=lambda kind: -kind["ms"])
    assert sum(kind["nodes"] for kind in profiled["kinds"]) >= 2
    assert all(kind["ms"] >= 0 for kind in profiled["kinds"])


def test_a_layer_with_a_changed_layout_keeps_its_time(tmp_path):
    """ONNX Runtime renames a convolution with many channels after its output, or after the output of a fused node."""
    generator = np.random.default_rng(0)
    weights = {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 5)}
    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["a"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="two", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "b"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("MatMul", ["g", "w3"], ["logits"], name="three.2"),
    ]
    graph = helper.make_graph(
        nodes,
        "laid out",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [
            numpy_helper.from_array(generator.standard_normal(shape, np.float32), name)
            for name, shape in weights.items()
        ],
    )
    path = tmp_path / "file.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    layers = {name: name for name in ("one", "two", "three")}
    images = np.zeros((2, 3, 8, 8), np.float32)
    assert set(profile(path, "onnxruntime", images, layers)["layers"]) == set(layers)


def test_profiling_leaves_no_file(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    node_times(named.path, "onnxruntime", named.images, runs=1)
    assert sorted(tmp_path.iterdir()) == before


class FakeRuntime:
    """A fake ONNX Runtime whose profile has one convolution of 1,500 microseconds in each run."""

    class SessionOptions:
        def add_session_config_entry(self, *_entry):
            pass

    class GraphOptimizationLevel:
        ORT_ENABLE_ALL = 99

    class InferenceSession:
        def __init__(self, _path, options, providers):
            self.file, self.runs = Path(f"{options.profile_file_prefix}.json"), 0

        def get_inputs(self):
            return [SimpleNamespace(name="images")]

        def run(self, *_given):
            self.runs += 1

        def end_profiling(self):
            node = {"cat": "Node", "name": "conv1_kernel_time", "dur": 1500, "args": {"op_name": "Conv"}}
            self.file.write_text(json.dumps([node, {"name": "model_run"}] * self.runs))
            return str(self.file)


def test_times_of_onnxruntime_are_in_milliseconds():
    runs = list(_onnxruntime(FakeRuntime, Path("m.onnx"), np.zeros((1, 3, 8, 8), np.float32), None, 2))
    assert runs == [[NodeTime("conv1", "Conv", 1.5)]] * 2


def test_a_node_time_is_the_median_of_the_runs_without_warm_up_summed_over_its_entries(monkeypatch):
    def runs(_module, _path, _batch, precision, count):
        assert precision == "float32"
        for number in range(count):
            slow = 0 if number >= 3 else 1000
            yield [NodeTime("a", "Conv", slow + 1), NodeTime("b", "Add", slow + number), NodeTime("a", "Conv", 2)]

    monkeypatch.setattr(node_profile, "_onnxruntime", runs)
    found = node_times(Path("m.onnx"), "onnxruntime", np.zeros((1, 3, 8, 8)), precision="float32", runs=3)
    assert found == [NodeTime("a", "Conv", 3), NodeTime("b", "Add", 4)]


def test_a_profile_sums_the_times_of_nodes_per_layer_and_kind(named, monkeypatch):
    times = [("norm", "Conv", 1.0), ("add", "Add", 2.0), ("answer_1", "Gemm", 4.0), ("norm_2", "Conv", 8.0)]
    monkeypatch.setattr(node_profile, "node_times", lambda *_given, **_options: [NodeTime(*each) for each in times])
    assert profile(named.path, "onnxruntime", named.images, LAYERS) == {
        "ms": 15,
        "kinds": [
            {"kind": "Conv", "nodes": 2, "ms": 9},
            {"kind": "Gemm", "nodes": 1, "ms": 4},
            {"kind": "Add", "nodes": 1, "ms": 2},
        ],
        "layers": {"mix": 9, "answer": 4},
    }


def test_an_incomplete_profile_raises_one_error(tmp_path):
    (tmp_path / "nodes.json").write_text('[{"cat": "Node", "na')
    with pytest.raises(InputError, match="could not write its whole profile"):
        _events(tmp_path / "nodes.json")
