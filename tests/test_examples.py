"""Every example runs at a small size."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_soft_targets_in_your_own_loop(capsys):
    example("soft_targets_own_loop").main(epochs=1, sizes=("resnet20", "resnet20"))
    assert "student" in capsys.readouterr().out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    example("ptq_then_export").main(folder, epochs=4)
    return folder


def test_ptq_then_export_writes_integer_weights(exported):
    import onnx

    def types(file):
        return {tensor.data_type for tensor in onnx.load(exported / file).graph.initializer}

    assert onnx.TensorProto.INT8 in types("model.onnx")
    assert onnx.TensorProto.INT8 not in types("original.onnx")
    assert (exported / "model.onnx").stat().st_size < (exported / "original.onnx").stat().st_size / 2


def with_pixels(exported, tmp_path, digits):
    """Return a folder whose model takes uint8 pixels: it normalizes them and runs the exported network."""
    import onnx

    inner = onnx.load(exported / "model.onnx")
    graph, mean, std = inner.graph, np.float32(digits.mean), np.float32(digits.std)
    for node in graph.node:
        node.input[:] = ["normalized" if name == "images" else name for name in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array((1 / (255 * std)).reshape(1, 3, 1, 1), "factor"))
    graph.initializer.append(onnx.numpy_helper.from_array((mean / std).reshape(1, 3, 1, 1), "offset"))
    make = onnx.helper.make_node
    steps = [
        make("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        make("Mul", ["floats", "factor"], ["scaled"]),
        make("Sub", ["scaled", "offset"], ["normalized"]),
    ]
    nodes = [*steps, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    onnx.save(inner, tmp_path / "model.onnx")
    return tmp_path


@pytest.mark.parametrize("kind", ["normalized", "uint8"])
def test_serving_needs_neither_tersor_nor_torch(exported, tmp_path, kind):
    from tersor.data import load

    digits = load(name="digits")
    if kind == "uint8":
        exported = with_pixels(exported, tmp_path, digits)
    numbers = {"mean": digits.mean, "std": digits.std, "classes": digits.classes}
    (exported / "numbers.json").write_text(json.dumps(numbers))
    images = digits.test.take(torch.arange(40)).permute(0, 2, 3, 1).numpy()
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels).save(path)
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0]); "
        "sys.exit(str({'torch', 'tersor'} & set(sys.modules)) if {'torch', 'tersor'} & set(sys.modules) else 0)"
    )
    served = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / "serve.py"), str(exported), *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert served.returncode == 0, served.stderr
    predicted = [line.split()[-1] for line in served.stdout.splitlines()]
    labels = [digits.classes[label] for label in digits.test.targets[:40]]
    assert sum(map(str.__eq__, predicted, labels)) > 30  # chance: 4


def test_iterative_pruning_ends_sparse(capsys):
    example("iterative_pruning").main(epochs=1, sparsities=(0.5, 0.8))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["0.0", "50.0", "80.0"]
