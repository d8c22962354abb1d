"""Evaluation of an existing artifact on the user's images."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from torch import nn

import tersor
from onnx_files import scaling_file, tiny_proto
from recorded_progress import RecordedProgress
from tersor.checkpoint.artifact import read_artifact, write_folder
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.data import loading
from tersor.deploy.onnx import export
from tersor.pipeline.artifact_settings import ImageOptions
from tersor.pipeline.evaluate import evaluate
from tersor.pipeline.setup import prepare
from tersor.recipe import parse
from tersor.recipe.data_source import YOUR_DATA


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
        (("dog", "cat"), "only their order differs"),
    ],
)
def test_different_classes_raise(images, tmp_path, classes, words):
    export(network(len(classes)), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", classes=classes)
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path / "model.onnx", str(images), None, progress=NullProgress())


def test_equal_classes_are_evaluated(images, tmp_path):
    always_cats = network(2)
    nn.init.zeros_(always_cats[3].weight)
    always_cats[3].bias.data = torch.tensor([1.0, 0.0])
    export(always_cats, torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", classes=("cat", "dog"))
    found = evaluate(tmp_path / "model.onnx", str(images), None, progress=NullProgress())
    assert (found.metric, found.score, found.images, found.runtime) == ("accuracy", 50.0, 6, "onnxruntime")
    assert str(found) == "accuracy 50.00 ± 20.41 % on 6 test images, onnxruntime in float32"
    assert found.score_error == pytest.approx(100 * (0.25 / 6) ** 0.5)
    assert str(dataclasses.replace(found, metric="mIoU", shown="50.00 %")).startswith("mIoU 50.00 % on 6 test images")


@pytest.mark.parametrize(("logits", "warned"), [(5, True), (2, False)])
def test_more_logits_than_classes_cause_a_warning(images, tmp_path, logits, warned):
    export(network(logits), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx")
    progress = RecordedProgress()
    evaluate(tmp_path / "model.onnx", str(images), None, progress=progress)
    expected = f"warning: the file returns {logits} logits, but the data has 2 classes."
    assert any(line.startswith(expected) for line in progress.lines) == warned


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_channels_of_the_file_and_the_computed_normalization_is_reported(images, tmp_path, channels):
    progress = RecordedProgress()
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    file = export(model, torch.rand(1, channels, 8, 8), tmp_path / "model.onnx")
    assert evaluate(file, str(images), None, progress=progress).images == 6
    mean, std = " ".join(["0.282"] * channels), " ".join(["0.176"] * channels)
    assert f"normalization: mean {mean}, std {std} (computed from the training images, since the file has none" in str(
        progress.lines
    )


RGB = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def test_a_given_normalization_is_used_and_reported(images, tmp_path):
    """The logits are the mean of the red channel and 0: positive where red is above its given mean."""
    model = network(2)
    model[0] = nn.Conv2d(3, 4, 1)
    model[0].weight.data = torch.eye(4, 3)[:, :, None, None]
    model[0].bias.data.zero_()
    model[3].weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    model[3].bias.data.zero_()
    for name in ("cat", "dog"):
        red = Image.new("RGB", (8, 8), (100 if name == "cat" else 80, 0, 0))
        for number in range(3):
            red.save(images / "test" / name / f"{number}.png")
    file, progress = export(model, torch.rand(1, 3, 8, 8), tmp_path / "model.onnx"), RecordedProgress()
    options = ImageOptions(mean=[90 / 255, 0.4, 0.3], std=[0.2, 0.25, 0.3])
    assert evaluate(file, str(images), None, options=options, progress=progress).score == 100
    assert "normalization: mean 0.353 0.4 0.3, std 0.2 0.25 0.3 (given)" in progress.lines
    low = ImageOptions(mean=[0.0, 0.4, 0.3], std=[0.2, 0.25, 0.3])
    assert evaluate(file, str(images), None, options=low, progress=progress).score == 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"mean": [0.1, 0.4, 0.3], "std": RGB[1]},
            r"--mean is 0\.1 0\.4 0\.3, but the network was exported with mean 0\.5 0\.4 0\.3 and std 0\.2 0\.25 ",
        ),
        ({"std": [0.3, 0.3, 0.3]}, r"--std is 0\.3 0\.3 0\.3, but"),
        ({"channels": 1}, r"--channels is 1, but the number of channels in the file is 3\. Leave it out"),
        ({"image_size": 9}, r"--image-size is 9 x 9, but the file takes 8 x 8"),
        ({"image_size": [8, 16]}, r"--image-size is 8 x 16, but the file takes 8 x 8"),
    ],
)
def test_options_that_contradict_the_file_raise(images, tmp_path, options, words):
    file = export(network(2), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", normalization=RGB)
    with pytest.raises(InputError, match=words):
        evaluate(file, str(images), None, options=ImageOptions(**options), progress=NullProgress())


def test_rounded_normalization_values_do_not_contradict_the_file(images, tmp_path):
    mean = (0.4914, 0.4822, 0.4465)
    file = export(network(2), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", normalization=(mean, RGB[1]))
    options, progress = ImageOptions(3, [0.491, 0.482, 0.447], RGB[1], 8), RecordedProgress()
    assert evaluate(file, str(images), None, options=options, progress=progress).images == 6
    assert "normalization: mean 0.491 0.482 0.447, std 0.2 0.25 0.3 (from the artifact)" in progress.lines


def test_a_file_that_takes_pixels_accepts_no_normalization(images, tmp_path):
    file = export(network(2), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", pixels=RGB)
    assert evaluate(file, str(images), None, progress=NullProgress()).images == 6
    with pytest.raises(InputError, match="takes uint8 pixels and normalizes them itself"):
        evaluate(file, str(images), None, options=ImageOptions(mean=RGB[0], std=RGB[1]), progress=NullProgress())


def test_images_are_resized_to_the_input_size_of_the_file(images, tmp_path):
    for part in ("train", "test"):
        Image.new("RGB", (11, 20)).save(images / part / "cat" / "tall.png")
    file, progress = export(network(2), torch.rand(1, 3, 8, 6), tmp_path / "model.onnx"), RecordedProgress()
    assert evaluate(file, str(images), None, progress=progress).images == 7
    assert "images of another size are resized to 8 x 6, the input size of the file" in progress.lines


def test_digits_and_images_from_a_function_are_loaded_in_the_input_size_of_the_file(tmp_path, monkeypatch):
    file = export(network(10), torch.rand(1, 3, 12, 12), tmp_path / "model.onnx")
    assert evaluate(file, "digits", None, progress=NullProgress()).images == 359
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_sets.py").write_text(
        "from PIL import Image\nitems = [(Image.new('RGB', (9, 9)), number % 10) for number in range(40)]\n"
        "def sets():\n    return items, items\n"
        "def read():\n    from tersor.data import load\n    return load(datasets={'train': items, 'test': items})\n"
    )
    assert evaluate(file, "my_sets.py:sets", None, progress=NullProgress()).images == 40
    with pytest.raises(InputError, match=r"returned images of 9x9 pixels, but image_size is 12. Resize them in the f"):
        evaluate(file, "my_sets.py:read", None, progress=NullProgress())


def test_a_file_quantized_for_another_runtime_causes_a_warning(images, tmp_path):
    quantized = tersor.quantize(network(2), torch.rand(8, 3, 8, 8), runtime="openvino")
    file, progress = export(quantized, torch.rand(1, 3, 8, 8), tmp_path / "model.onnx"), RecordedProgress()
    assert evaluate(file, str(images), None, progress=RecordedProgress()).runtime == "openvino"
    evaluate(file, str(images), "onnxruntime", progress=progress)
    (warning,) = (line for line in progress.lines if "openvino" in line)
    assert warning.startswith(
        "warning: the file was made for openvino and runs in onnxruntime, where fewer operators may"
    )
    assert warning.endswith("Write --runtime openvino.")
    quiet = RecordedProgress()
    evaluate(export(network(2), torch.rand(1, 3, 8, 8), file, normalization=RGB), str(images), None, progress=quiet)
    assert not any("warning" in line for line in quiet.lines)


def test_the_data_of_a_search_started_in_python_has_to_be_given(tmp_path):
    recipe = f"{{model: {{name: resnet20}}, data: {{name: '{YOUR_DATA}'}}, stages: [{{name: a}}]}}"
    with pytest.raises(InputError, match=r"were passed in Python, so .* Write --data FOLDER, or"):
        evaluate(folder_saying(tmp_path, recipe=recipe, numbers="{}"), None, None, progress=NullProgress())
    with pytest.raises(InputError, match=r"splits in its recipe is a placeholder. Write data: {folder: PATH}, or data"):
        prepare(parse(recipe, "recipe.yaml"), model=None, data=None, progress=NullProgress())


def test_folders_of_a_search_and_of_its_points_are_evaluated(images, tmp_path):
    """They have no manifest; the normalization of a point is in its file, that of the search in `front.json`."""
    search, point = tmp_path / "search", tmp_path / "search" / "points" / "small"
    point.mkdir(parents=True)
    (search / "baselines").mkdir()
    recipe = f"{{model: {{name: resnet20}}, data: {{folder: '{images}'}}, stages: [{{name: a}}]}}"
    for folder in (search, point):
        export(network(2), torch.rand(1, 3, 8, 8), folder / "model.onnx", normalization=RGB)
        (folder / "recipe.yaml").write_text(recipe)
    scaling_file(search / "baselines" / "original.onnx", 2.0)
    (search / "front.json").write_text('{"runtime": "onnxruntime", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}')
    (point / "numbers.json").write_text('{"name": "small", "runtime": "onnxruntime", "validation": 90.0}')
    for folder in (search, point):
        progress = RecordedProgress()
        found = evaluate(folder, None, None, progress=progress)
        assert (found.images, found.runtime) == (6, "onnxruntime")
        assert "normalization: mean 0.5 0.4 0.3, std 0.2 0.25 0.3 (from the artifact)" in progress.lines
        assert read_artifact(folder).files["original.onnx"] == search / "baselines" / "original.onnx"
        assert not [line for line in progress.lines if "validation images" in line]


@pytest.mark.parametrize("made", ["model.onnx", "points/small", "points/small/model.onnx", "baselines/model.onnx"])
def test_evaluating_a_search_that_used_test_images_for_its_choice_causes_a_warning(images, tmp_path, made):
    for folder in (tmp_path, tmp_path / "points" / "small", tmp_path / "baselines"):
        folder.mkdir(parents=True, exist_ok=True)
        export(network(2), torch.rand(1, 3, 8, 8), folder / "model.onnx", normalization=RGB)
    (tmp_path / "front.json").write_text('{"tests_chose": true}')
    progress = RecordedProgress()
    evaluate(tmp_path / made, str(images), None, progress=progress)
    (line,) = [line for line in progress.lines if "validation images" in line]
    assert line.startswith(
        "warning: if these are the images of the search, half of the test images were the validation images"
    )


def test_a_file_is_compared_with_the_original_in_its_folder(images, tmp_path):
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
    assert str(found).endswith(" on 15 test images, onnxruntime in int8, rest float32")


def test_a_truncated_file_raises(images, tmp_path):
    proto, _ = tiny_proto(np.random.default_rng(0))
    whole = proto.SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.onnx is damaged or not an ONNX file"):
        evaluate(tmp_path / "cut.onnx", str(images), None, progress=NullProgress())


def folder_saying(tmp_path, *, recipe, numbers):
    def fill(folder):
        export(network(2), torch.rand(1, 3, 8, 8), folder / "model.onnx", classes=("cat", "dog"))
        (folder / "recipe.yaml").write_text(recipe)
        (folder / "numbers.json").write_text(numbers)

    return write_folder(tmp_path / "out", fill)


def test_code_named_in_a_folder_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange.py").write_text("import os\nos.mkdir('executed')\ndef data(): ...\n")
    recipe = "{model: {name: resnet20}, data: {name: 'strange:data'}, stages: [{name: a}]}"
    with pytest.raises(InputError, match=r"Code of an artifact is never executed\. If the function is yours, write"):
        evaluate(folder_saying(tmp_path, recipe=recipe, numbers="{}"), None, None, progress=NullProgress())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("numbers", ["[]", "{", '{"mean": 1}', '{"std": [1, 2, NaN]}', '{"runtime": {}}', "[" * 99_999])
def test_numbers_json_with_a_wrong_structure_raises(images, tmp_path, numbers):
    folder = folder_saying(tmp_path, recipe="", numbers=numbers)
    with pytest.raises(InputError, match=r"numbers\.json (is damaged|was not written by this version)"):
        evaluate(folder, str(images), None, progress=NullProgress())


@pytest.mark.parametrize("memory", [2**31, 0])
def test_without_a_test_set_all_images_of_the_folder_are_used(images, tmp_path, monkeypatch, memory):
    export(network(2), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", classes=("cat", "dog"))
    progress = RecordedProgress()
    monkeypatch.setattr(loading, "MEMORY", memory)
    given = ImageOptions(mean=[0.5] * 3, std=[0.25] * 3)
    found = evaluate(tmp_path / "model.onnx", str(images / "test"), None, options=given, progress=progress)
    count = len(list((images / "test").rglob("*.png")))
    assert found.images == count == 6
    assert found == evaluate(tmp_path / "model.onnx", str(images), None, options=given, progress=NullProgress())
    assert f"the data has no test set of its own: all {count} images are used" in progress.lines
    progress = RecordedProgress()
    evaluate(tmp_path / "model.onnx", str(images), None, progress=progress)
    assert not any("no test set" in line for line in progress.lines)


def test_a_float_run_is_evaluated_in_another_runtime_without_a_warning(images, tmp_path):
    recipe = "{model: {name: resnet20}, data: {name: digits}, stages: [{name: a}]}"
    folder = folder_saying(tmp_path, recipe=recipe, numbers='{"runtime": "openvino"}')
    progress = RecordedProgress()
    evaluate(folder, str(images), "onnxruntime", progress=progress)
    (warning,) = [line for line in progress.lines if "warning" in line]
    assert warning.startswith("warning: normalization: mean ")
    assert "(computed from the training images, since the file has none; " in warning
