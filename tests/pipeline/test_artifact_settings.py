"""Task, data, classes and normalization of an existing artifact."""

import onnx
import pytest

from tersor.checkpoint.artifact import Artifact
from tersor.core.errors import InputError
from tersor.pipeline.artifact_settings import class_names, data_source, numbers_of, original_file, task_of_artifact
from tersor.tasks.distance import Distance
from tersor.tasks.segmentation import Segmentation

RECIPE = "{model: {name: resnet20}, task: TASK, data: {name: digits, augment: flip, limit: 9}, stages: [{name: a}]}"


def file_with(path, **metadata):
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def artifact(folder, *, recipe=None, numbers=None, original=False, **metadata):
    files = {"model.onnx": file_with(folder / "model.onnx", **metadata)}
    for name, text in (("recipe.yaml", recipe), ("numbers.json", numbers)):
        if text is not None:
            files[name] = folder / name
            files[name].write_text(text)
    if original:
        files["original.onnx"] = folder / "original.onnx"
    return Artifact(folder, files["model.onnx"], files)


def test_the_task_is_the_argument_or_that_of_the_recipe_or_classification(tmp_path):
    bare = artifact(tmp_path)
    assert task_of_artifact(bare, None).metric == "accuracy"
    assert isinstance(task_of_artifact(bare, "distance"), Distance)
    folder = artifact(tmp_path, recipe=RECIPE.replace("TASK", "{segmentation: {num_classes: 4}}"))
    found = task_of_artifact(folder, None)
    assert isinstance(found, Segmentation)
    assert found.num_classes == 4
    assert isinstance(task_of_artifact(folder, "distance"), Distance)
    own = artifact(tmp_path, recipe=RECIPE.replace("TASK", "'strange:Task'"))
    with pytest.raises(InputError, match=r"has the task 'strange:Task'\. Code of an artifact is never executed"):
        task_of_artifact(own, None)
    assert isinstance(task_of_artifact(own, "distance"), Distance)


def test_the_original_is_a_file_in_the_folder_of_the_run(tmp_path):
    assert original_file(artifact(tmp_path, original=True)) == tmp_path / "original.onnx"
    with pytest.raises(InputError, match=r"has no original\.onnx to compare with"):
        original_file(artifact(tmp_path))


def test_class_names_are_read_from_the_file(tmp_path):
    assert class_names(file_with(tmp_path / "a.onnx", classes='["cat", "dog"]')) == ["cat", "dog"]
    assert class_names(file_with(tmp_path / "b.onnx")) is None
    assert class_names(tmp_path / "model.xml") is None
    for text in ("cat", '{"cat": 1}', "[1]"):
        with pytest.raises(InputError, match="the class names in the metadata of"):
            class_names(file_with(tmp_path / "c.onnx", classes=text))


def test_the_normalization_is_read_from_numbers_json_or_from_the_file(tmp_path):
    settings = '{"mean": [0.5, 0.25], "std": [1.0, 2.0]}'
    expected = {"mean": (0.5, 0.25), "std": (1.0, 2.0)}
    assert numbers_of(artifact(tmp_path)) == {}
    assert numbers_of(artifact(tmp_path, normalization=settings)) == expected
    written = '{"runtime": "openvino", "mean": [0.5], "std": [1.0], "score": 3}'
    assert numbers_of(artifact(tmp_path, numbers=written, normalization=settings)) == {
        "runtime": "openvino", "mean": (0.5,), "std": (1.0,)
    }  # fmt: skip
    assert numbers_of(artifact(tmp_path, numbers="{}", normalization=settings)) == expected, "as of a point"
    with pytest.raises(InputError, match="the normalization in the metadata of"):
        numbers_of(artifact(tmp_path, normalization='{"mean": "x"}'))


@pytest.mark.parametrize("text", ["{", '{"mean": 1}'])
def test_the_error_for_a_damaged_search_does_not_suggest_running_a_recipe(tmp_path, text):
    run = artifact(tmp_path, numbers=text)
    with pytest.raises(InputError, match=r"numbers\.json .* Run its recipe\.yaml again\.$"):
        numbers_of(run)
    (tmp_path / "front.json").write_text(text)
    search = Artifact(tmp_path, run.model, {**run.files, "numbers.json": tmp_path / "front.json"})
    with pytest.raises(InputError, match=r"front\.json .* Repeat the search in another folder\.$"):
        numbers_of(search)


def test_the_data_is_the_argument_or_that_of_the_recipe(tmp_path):
    folder = artifact(tmp_path, recipe=RECIPE.replace("TASK", "classification"))
    assert data_source(folder, str(tmp_path)) == {"folder": str(tmp_path)}
    assert data_source(folder, str(tmp_path / "recipe.yaml")) == {"csv": str(tmp_path / "recipe.yaml")}
    assert data_source(folder, "scenes") == {"name": "scenes"}
    settings = data_source(folder, None)
    assert (settings["name"], settings["limit"]) == ("digits", 9)
    assert not {"augment", "mean", "std"} & settings.keys()
    with pytest.raises(InputError, match="does not name its data"):
        data_source(artifact(tmp_path), None)
    own = artifact(tmp_path, recipe=RECIPE.replace("TASK", "classification").replace("digits", "'strange:data'"))
    with pytest.raises(InputError, match="loads images with the function 'strange:data'"):
        data_source(own, None)
    assert data_source(own, "strange:data") == {"name": "strange:data"}
