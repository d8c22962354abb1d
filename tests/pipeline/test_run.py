"""The phases of a run, and its warning if the artifact and torch predict differently."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import nn

from recorded_progress import RecordedProgress
from tersor import recipe as recipes
from tersor.core.errors import InputError
from tersor.evaluation.metric import Metric
from tersor.evaluation.results import FileResults, Results, StageRecord
from tersor.methods.ptq import PTQ
from tersor.models import build
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.run import _disagreement, _seen_validation
from tersor.recipe import parse
from tersor.tasks.classification import Classification
from tersor.training.context import AttachContext

ACCURACY = Metric(name="accuracy", unit="%", higher_is_better=True)

module = importlib.import_module("tersor.pipeline.run")


@pytest.mark.parametrize(("bits", "activation_bits", "harmless"), [(8, 8, False), (8, 4, True), (4, 8, True)])
def test_a_difference_between_file_and_torch_is_harmless_only_for_few_bits(bits, activation_bits, harmless):
    attached = PTQ(bits=bits, activation_bits=activation_bits).attach(
        build("resnet20", 10).eval(), AttachContext(data=[torch.randn(4, 3, 16, 16)])
    )
    attached.begin()
    results = Results.model_construct(agreement_with_torch=96.0, metric=ACCURACY)
    warning = _disagreement(results, attached.model)
    assert warning.startswith(
        "only 96.00 % of the predictions of model.onnx agree with those of the network in torch. "
    )
    assert ("Do not deploy model.onnx" in warning) != harmless
    assert "Do not deploy model.onnx" in _disagreement(results, build("resnet20", 10))
    assert not _disagreement(results.model_copy(update={"agreement_with_torch": 99.0}), attached.model)


@pytest.mark.parametrize(
    ("validation", "trained", "warns"), [(74.6, True, True), (74.6, False, False), (71.0, True, False)]
)
def test_a_validation_score_far_above_the_test_score_causes_a_warning(validation, trained, warns):
    experiment = SimpleNamespace(
        task=Classification(), model_is_trained=trained, data=SimpleNamespace(validation=[0] * 1200)
    )
    record = StageRecord(name="a", methods=[], steps=0, minutes=0.0, validation_score=validation)
    artifact = FileResults.model_construct(score=68.7)
    results = Results.model_construct(artifact=artifact, stages=[record], test_images=2400)
    line = _seen_validation(experiment, results)
    assert bool(line) == warns
    if warns:
        assert "is 74.60 %, more than three standard errors above the 68.70 % on the test images" in line


RECIPE = "{model: {name: resnet20}, data: {name: digits}, stages: [{name: a}]}"


@pytest.fixture
def faked(monkeypatch):
    """A run without networks. Returns the log of its phases."""
    log = []
    text = recipes.write(parse(RECIPE, "recipe.yaml"))

    def stages(experiment, checkpoints, _progress):
        log.append("stages")
        experiment.latency.file.write_text("{}")
        checkpoints.save(1, "a", step=1, done=True, tensors={}, structure={}, record={})
        checkpoints.damaged = [Path("x"), Path("x")]
        return nn.Identity(), []

    def fill(folder, *_, latency):
        log.append("fill" if latency else "fill without latency")
        (folder / "recipe.yaml").write_text(text)
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), folder / "model.onnx")

    made = Experiment(parse(RECIPE, "recipe.yaml"), None, nn.Identity(), None, None, True, False)
    monkeypatch.setattr(module.distributed, "init_process_group", lambda: log.append("init"))
    monkeypatch.setattr(module, "prepare", lambda *_, **__: log.append("prepare") or made)
    monkeypatch.setattr(module, "train_teacher", lambda *_: log.append("teacher"))
    monkeypatch.setattr(module, "run_stages", stages)
    monkeypatch.setattr(module, "_fill", fill)
    return log


def test_a_run_executes_its_phases_in_order(tmp_path, faked):
    progress = RecordedProgress()
    out = module.run(parse(RECIPE, "r"), out=tmp_path / "out", progress=progress)
    assert out == tmp_path / "out"
    assert faked == ["init", "prepare", "teacher", "stages", "fill"]
    assert progress.lines == ["x is damaged and was skipped."]
    assert [each.name for each in tmp_path.iterdir()] == ["out"], "no checkpoints are left"
    with pytest.raises(InputError, match="already exists"):
        module.run(parse(RECIPE, "r"), out=out)


def test_a_complete_run_is_not_repeated_and_its_checkpoints_are_removed(tmp_path, faked):
    out = module.run(parse(RECIPE, "r"), out=tmp_path / "out", resume=True)
    left = tmp_path / "out.checkpoints"
    left.mkdir()
    progress = RecordedProgress()
    faked.clear()
    assert module.run(parse(RECIPE, "r"), out=out, resume=True, progress=progress) == out
    assert faked == ["init"]
    assert progress.lines == [f"{out} exists: the run is complete."]
    assert not left.exists()
    other = parse(RECIPE.replace("name: a", "name: b"), "r")
    with pytest.raises(InputError, match="already exists"):
        module.run(other, out=out, resume=True)


def test_a_complete_run_without_latency_suggests_how_to_measure_it(tmp_path, faked, monkeypatch):
    out, options = tmp_path / "out", {"out": tmp_path / "out", "resume": True}
    module.run(parse(RECIPE, "r"), latency=False, **options)
    assert faked[-1] == "fill without latency"
    monkeypatch.setattr(module, "_has_latency", lambda _: False)
    progress = RecordedProgress()
    module.run(parse(RECIPE, "r"), progress=progress, latency=False, **options)
    assert progress.lines == [f"{out} exists: the run is complete."]
    module.run(parse(RECIPE, "r"), progress=progress, **options)
    assert progress.lines[2:] == [f"the run in {out} did not measure latency. To measure it: tersor bench {out}"]


def test_cached_latencies_are_kept_only_if_the_run_is_resumed(tmp_path, faked, monkeypatch):
    def teacher(experiment, *_):
        faked.append(experiment.latency.file.exists())

    monkeypatch.setattr(module, "train_teacher", teacher)
    for number, resume in enumerate((False, True)):
        left = tmp_path / f"{number}.checkpoints"
        left.mkdir()
        (left / "latencies.json").write_text("{}")
        module.run(parse(RECIPE, "r"), out=tmp_path / str(number), resume=resume)
    assert [each for each in faked if isinstance(each, bool)] == [False, True]


def test_only_the_first_process_writes(tmp_path, faked, monkeypatch):
    monkeypatch.setattr(module.distributed, "rank", lambda: 1)
    monkeypatch.setattr(module, "run_stages", lambda *_: (nn.Identity(), []))
    progress = RecordedProgress()
    module.run(parse(RECIPE, "r"), out=tmp_path / "out", progress=progress)
    assert "fill" not in faked
    assert not list(tmp_path.iterdir())
    assert not progress.lines


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": 1}, "model is of type int"),
        ({"teacher": 1}, "teacher is of type int"),
        ({"data": 1}, "data is of type int"),
        ({"recipe": 1}, "recipe is of type int"),
        ({"out": "."}, "out is '.', which exists. Write the name of a new folder, such as runs/recipe"),
        ({"out": ""}, "out is '.', which exists"),
        ({"out": "/"}, "out is '/', which exists"),
    ],
)
def test_arguments_of_a_wrong_type_raise(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        module.run(**({"recipe": parse(RECIPE, "r"), "out": tmp_path / "out"} | given))


def test_the_default_folder_is_named_after_the_recipe(tmp_path, faked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE)
    assert module.run("mine.yaml") == Path("runs/mine")
    assert module.run(parse(RECIPE, "r")) == Path("runs/recipe")
