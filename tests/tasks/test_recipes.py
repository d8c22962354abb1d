"""A recipe of each task, from the file to the report."""

from __future__ import annotations

import json
import re

import pytest
from networks import network, splits

from tersor import tasks
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.evaluation import measurement
from tersor.pipeline import run as pipeline
from tersor.pipeline.dry_run import explain
from tersor.pipeline.evaluate import evaluate
from tersor.pipeline.setup import prepare
from tersor.recipe import parse, write

RECIPE = """\
model: {name: "networks:network"}
task: TASK
teacher: original
data: {name: "networks:splits"}
stages:
  - {name: tune, epochs: 1, batch_size: 8, optimizer: {learning_rate: 0.01}, methods: [METHOD]}
  - {name: quantize, methods: [{ptq: {calibration_images: 16}}]}
"""
OWN = "networks:CountsError"


class RecordedLines(NullProgress):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A function that runs a recipe with short measurements and returns folder, numbers, page, and printed lines."""

    def run(task, kind, method="group_lasso"):
        measure = pipeline.measure
        monkeypatch.setattr(pipeline, "measure", lambda *given, **options: measure(*given, **options, seconds=0.01))
        monkeypatch.setattr(measurement, "installed_runtimes", lambda: ["onnxruntime"])
        recipe, lines = parse(RECIPE.replace("TASK", task).replace("METHOD", method), "recipe.yaml"), RecordedLines()
        folder = pipeline.run(recipe, model=network(kind), data=splits(kind), out=tmp_path / "run", progress=lines)
        numbers = json.loads((folder / "numbers.json").read_text())
        return folder, numbers, (folder / "report.html").read_text(), lines.lines

    return run


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<main>")[2]))


@pytest.mark.parametrize(
    ("task", "kind", "drawn"),
    [
        ("{segmentation: {num_classes: 3}}", "segmentation", ["original", "artifact", "label"]),
        pytest.param("detection", "detection", ["original", "artifact", "label"], marks=pytest.mark.slow),
        pytest.param("multilabel", "multilabel", ["image"], marks=pytest.mark.slow),
        pytest.param("regression", "regression", ["image"], marks=pytest.mark.slow),
        pytest.param("embedding", "embedding", ["image"], marks=pytest.mark.slow),
        pytest.param("distance", "distance", ["image"], marks=pytest.mark.slow),
        pytest.param(OWN, "regression", ["image"], marks=pytest.mark.slow),
    ],
)
def test_a_run_is_measured_and_reported_in_the_metric_of_its_task(ran, task, kind, drawn):
    folder, numbers, page, lines = ran(task, kind)
    built = parse(RECIPE.replace("TASK", task).replace("METHOD", "group_lasso"), "recipe.yaml").task.build()
    named = {"name": built.metric, "unit": built.unit, "higher_is_better": built.higher_is_better}
    assert numbers["metric"] == named
    assert any(f"tune: {built.metric} " in line and "8 validation images" in line for line in lines)
    shown = text_of(page)
    assert "ccuracy" not in shown
    assert "ccuracy" not in json.dumps(numbers)
    assert built.metric in shown[:400]
    assert numbers["stages"][0]["validation_score"] is not None
    outputs = json.loads((folder / "evidence.json").read_text())["outputs"]
    assert outputs["examples"] or outputs["agreement"] == 100
    assert all(list(example["pictures"]) == drawn for example in outputs["examples"])
    assert [each["class"] for each in outputs["classes"]] == list(splits(kind).classes)


def test_evaluating_a_run_again_gives_the_same_score(ran, monkeypatch):
    folder, numbers, *_ = ran("segmentation", "segmentation")
    found = evaluate(folder, "networks:segmentation_splits", None, progress=NullProgress())
    assert found.score == pytest.approx(numbers["artifact"]["score"])
    assert str(found).startswith(f"mIoU {found.score:.2f} % on 16 test images")


def test_a_task_is_unchanged_in_a_written_recipe():
    for task in ("segmentation", "{segmentation: {num_classes: 4, ignore_index: 0}}", OWN, "classification"):
        recipe = parse(RECIPE.replace("TASK", task).replace("METHOD", "soft_targets"), "recipe.yaml")
        assert parse(write(recipe), "again") == recipe
        assert ("task:" in write(recipe)) == (task != "classification")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("segmantation", "unknown task 'segmantation'. Did you mean 'segmentation'"),
        (
            "{segmentation: {num_classes: few}}",
            "recipe.yaml, line .*: num_classes should be a whole number, got",
        ),
        ("{segmentation: 4}", "parameters of task segmentation must be keys with values, got 4"),
        ("[segmentation]", "task must be a name, or a name with parameters"),
        ("{segmentation: {}, detection: {}}", "task must be a name, or a name with parameters"),
    ],
)
def test_an_invalid_task_in_a_recipe_raises(task, message):
    with pytest.raises(InputError, match=message):
        parse(RECIPE.replace("TASK", task).replace("METHOD", "soft_targets"), "recipe.yaml")


def test_parsing_a_recipe_does_not_import_the_users_task():
    assert parse(RECIPE.replace("TASK", "nowhere:Task").replace("METHOD", "soft_targets"), "recipe.yaml").task.is_own


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("classification", "segmentation", "the targets of the images are not class indices"),
        ("segmentation", "regression", "does not fit task segmentation: a segmentation network returns logits"),
        ("segmentation", "distance", "the images have no targets"),
    ],
)
def test_data_and_networks_that_do_not_match_the_task_raise(task, kind, message):
    recipe = parse(RECIPE.replace("TASK", task).replace("METHOD", "soft_targets"), "recipe.yaml")
    with pytest.raises(InputError, match=message):
        prepare(recipe, model=network(kind), data=splits(kind), progress=NullProgress())


def test_explain_shows_the_task_and_the_shapes_of_its_outputs():
    text = RECIPE.replace("TASK", "distance").replace("METHOD", "group_lasso").replace("teacher: original\n", "")
    recipe = parse(
        text.replace("networks:network", "networks:several").replace("networks:splits", "networks:unlabelled"),
        "recipe.yaml",
    )
    with pytest.raises(InputError, match="task distance compares the outputs with those of the model before"):
        list(explain(recipe, progress=NullProgress()))
    recipe = parse(
        text.replace("distance", "segmentation")
        .replace("networks:network", "networks:masks")
        .replace("networks:splits", "networks:segmentation_splits"),
        "recipe.yaml",
    )
    lines = list(explain(recipe, progress=NullProgress()))
    assert lines[0].endswith("task segmentation: mIoU")
    assert "-> (3, 16, 16)" in lines[1]


def test_there_is_a_test_network_for_every_task():
    assert all(network(name) is not None for name in tasks.NAMES)
