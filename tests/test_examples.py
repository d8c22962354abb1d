"""Every example runs with a small configuration."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tersor import models
from tersor.pruning.mask import weight_mask

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_soft_targets_own_loop_trains_a_student(capsys):
    example("soft_targets_own_loop").main(epochs=1, sizes=("resnet20", "resnet20"))
    assert "student" in capsys.readouterr().out


def test_train_digits_writes_weights_for_the_demo(tmp_path, capsys):
    example("train_digits").main(tmp_path / "new", epochs=1)
    models.load_weights(models.build("resnet32", 10), tmp_path / "new" / "weights.safetensors")
    assert "% accuracy" in capsys.readouterr().out


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


def test_iterative_pruning_reaches_its_sparsities(capsys):
    example("iterative_pruning").main(epochs=1, sparsities=(0.5, 0.8))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["0.0", "50.0", "80.0"]


@pytest.fixture
def few_test_scenes(monkeypatch):
    monkeypatch.setattr("tersor.data.datasets.TEST", 20)


@pytest.mark.slow
def test_segmentation_reports_miou(tmp_path, capsys, few_test_scenes):
    example("segmentation").main(tmp_path, epochs=1, images=32)
    original, artifact = capsys.readouterr().out.splitlines()
    assert original.startswith("original: mIoU ")
    assert artifact.startswith("artifact: mIoU ")
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "original.onnx").stat().st_size / 4


@pytest.mark.slow
def test_detection_compresses_the_backbone(capsys, few_test_scenes):
    example("detection").main(epochs=1, images=32)
    assert re.fullmatch(
        r"mAP50: original [\d.]+ %; half of the MACs [\d.]+ %; and 8 bits [\d.]+ %\n", capsys.readouterr().out
    )


@pytest.mark.slow
def test_regression_predicts_angles(tmp_path, capsys):
    example("regression").main(tmp_path, epochs=3)
    errors = [float(line.split(" ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) == 2
    assert max(errors) < 25  # the error of a constant prediction is 30 degrees


@pytest.mark.slow
def test_own_loop_with_a_users_data_and_loss_trains(capsys):
    example("own_loop").main(epochs=1)
    scores = [float(line.split(" ")[-5]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 2
    assert min(scores) > 60  # chance: 50


def test_a_center_detector_finds_boxes_where_its_loss_is_small():
    """Maps with a peak at each center and correct sides have a small loss and a perfect mAP50."""
    module = example("center_detection")
    boxes = torch.tensor([[4.0, 8.0, 20.0, 24.0], [30.0, 30.0, 62.0, 50.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([2, 1])}]
    cells = [(4, 3, 1, boxes[0]), (10, 11, 0, boxes[1])]  # row, column, map
    centers, sides = torch.full((1, 3, 16, 16), -8.0), torch.zeros(1, 4, 16, 16)
    for row, column, label, box in cells:
        centers[0, label, row, column] = 8.0
        x, y = column + 0.5, row + 0.5
        wanted = torch.stack([x - box[0] / 4, y - box[1] / 4, box[2] / 4 - x, box[3] / 4 - y])
        sides[0, :, row, column] = wanted.expm1().log()  # the inverse of softplus
    task, outputs = module.CenterDetection(), {"centers": centers, "sides": sides}
    [found] = task.predictions(outputs)
    best = found["scores"].argsort(descending=True)[:2]
    order = found["labels"][best].argsort(descending=True)
    torch.testing.assert_close(found["boxes"][best][order], boxes)
    assert task.score([(task.predictions(outputs), targets)]) == pytest.approx(100)
    assert task.loss(outputs, targets) < 0.01 < 1 < task.loss({"centers": -centers, "sides": sides}, targets)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmentation", "detection"])
def test_recipes_with_scenes_run(name, tmp_path, monkeypatch, few_test_scenes):
    from tersor.evaluation import measurement
    from tersor.pipeline.run import run
    from tersor.recipe import read

    monkeypatch.syspath_prepend(EXAMPLES.parent)
    measured = measurement.measure_latency
    monkeypatch.setattr(
        measurement, "measure_latency", lambda *given, **named: measured(*given, **named | {"seconds": 0.2})
    )
    small = ["data.limit=64", "data.image_size=32", "teacher.epochs=1", "stages.0.epochs=1", "stages.1.epochs=1"]
    folder = run(read(EXAMPLES.parent / "recipes" / f"{name}.yaml", small), out=tmp_path / "run")
    numbers = json.loads((folder / "numbers.json").read_text())
    metric = {"segmentation": "mIoU", "detection": "mAP50"}[name]
    assert numbers["metric"]["name"] == metric
    assert 0 <= numbers["artifact"]["score"] <= 100
    assert metric in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"),
    [("lightning_training", "lightning"), ("hugging_face_trainer", "transformers"), ("timm_training", "timm")],
)
def test_a_method_can_be_trained_with_another_trainer(name, package):
    pytest.importorskip(package)
    torch.manual_seed(0)
    trained = example(name).main()
    assert trained(torch.randn(2, 3, 32, 32)).isfinite().all()
    if name == "hugging_face_trainer":
        masks = [mask for layer in trained.modules() if (mask := weight_mask(layer)) is not None]
        assert sum(int(mask.mask.sum()) for mask in masks) == sum(mask.mask.numel() for mask in masks) // 2
