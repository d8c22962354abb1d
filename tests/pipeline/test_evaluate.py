"""An artifact that is there already, on images of the user's."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from torch import nn

from onnx_files import scaling_file, tiny_proto
from recorded_progress import RecordedProgress
from tersor.checkpoint.artifact import write_folder
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.deploy.onnx import export
from tersor.pipeline.evaluate import evaluate


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)).eval()


@pytest.fixture
def images(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("cat", "cow"), "the data lacks cow; the artifact lacks dog"),
        (("cat", "cow", "dog"), r"lacks cow\. Give"),
        (("dog", "cat"), "their order"),
    ],
)
def test_other_classes_are_refused(images, tmp_path, classes, words):
    export(network(len(classes)), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", classes=classes)
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path / "model.onnx", str(images), None, progress=NullProgress())


def test_the_same_classes_are_not(images, tmp_path):
    always_cats = network(2)
    nn.init.zeros_(always_cats[3].weight)
    always_cats[3].bias.data = torch.tensor([1.0, 0.0])
    export(always_cats, torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", classes=("cat", "dog"))
    found = evaluate(tmp_path / "model.onnx", str(images), None, progress=NullProgress())
    assert (found.metric, found.score, found.images, found.runtime) == ("accuracy", 50.0, 6, "onnxruntime")
    assert str(found) == "50.00 % of 6 test images, onnxruntime in float32"
    assert str(dataclasses.replace(found, metric="mIoU")).startswith("mIoU 50.00 % on 6 test images")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_channels_of_the_file_and_their_normalization_is_said(images, tmp_path, channels):
    progress = RecordedProgress()
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    file = export(model, torch.rand(1, channels, 8, 8), tmp_path / "model.onnx")
    assert evaluate(file, str(images), None, progress=progress).images == 6
    mean, std = " ".join(["0.282"] * channels), " ".join(["0.176"] * channels)
    assert f"normalization: mean {mean}, std {std} (computed from the training images, since the file has none" in str(
        progress.lines
    )


def test_a_file_is_compared_with_the_original_of_its_folder(images, tmp_path):
    def fill(folder):
        for name, factor in (("original", 2.0), ("model", 3.0)):
            scaling_file(folder / f"{name}.onnx", factor)

    folder = write_folder(tmp_path / "out", fill)
    found = evaluate(folder, str(images), None, "distance", progress=NullProgress())
    assert (found.metric, found.shown) == ("relative error", "50.00 %")


def test_the_precision_of_a_quantized_file_is_that_of_its_weights(images, tmp_path):
    proto, weights = tiny_proto(np.random.default_rng(0))
    kernel = [each.name for each in proto.graph.initializer].index("kernel")
    stored, scale = weights["kernel"].astype(np.int8), np.float32(0.1)
    proto.graph.initializer[kernel].CopyFrom(numpy_helper.from_array(stored, "integers"))
    proto.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", ["integers", "scale"], ["kernel"]))
    onnx.save(proto, tmp_path / "int8.onnx")
    for name in ("bird", "cow", "fox"):
        for part in ("train", "test"):
            shutil.copytree(images / part / "cat", images / part / name)
    found = evaluate(tmp_path / "int8.onnx", str(images), None, progress=NullProgress())
    assert str(found).endswith(" of 15 test images, onnxruntime in int8, rest float32")


def folder_saying(tmp_path, *, recipe, numbers):
    def fill(folder):
        export(network(2), torch.rand(1, 3, 8, 8), folder / "model.onnx", classes=("cat", "dog"))
        (folder / "recipe.yaml").write_text(recipe)
        (folder / "numbers.json").write_text(numbers)

    return write_folder(tmp_path / "out", fill)


def test_code_that_a_folder_names_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange.py").write_text("import os\nos.mkdir('executed')\ndef data(): ...\n")
    recipe = "{model: {name: resnet20}, data: {name: 'strange:data'}, stages: [{name: a}]}"
    with pytest.raises(InputError, match=r"Code of an artifact is never executed\. If the function is yours, write"):
        evaluate(folder_saying(tmp_path, recipe=recipe, numbers="{}"), None, None, progress=NullProgress())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("numbers", ["[]", "{", '{"mean": 1}', '{"std": [1, 2, NaN]}', '{"runtime": {}}', "[" * 99_999])
def test_numbers_of_another_shape_are_told(images, tmp_path, numbers):
    folder = folder_saying(tmp_path, recipe="", numbers=numbers)
    with pytest.raises(InputError, match=r"numbers\.json (is damaged|was not written by this version)"):
        evaluate(folder, str(images), None, progress=NullProgress())
