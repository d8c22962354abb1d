"""`tersor.compress` and `tersor pick` on small networks, and mistakes of users."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from evidence_page import undocumented
from recorded_progress import RecordedProgress
from tersor import cli, models, recipe
from tersor.checkpoint.artifact import read_artifact
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.data import Splits, load
from tersor.data.image_sets import Pixels, View
from tersor.evaluation import latency
from tersor.evaluation.session import open_session
from tersor.pipeline.evaluate import evaluate
from tersor.search.compression_budget import Budget, parse_latency
from tersor.search.folder import MODEL, RECIPE, STATE, UNCHANGED, SearchFolder, read_front
from tersor.search.point_evidence import read_evidence
from tersor.search.search_metric import Measured

compress = importlib.import_module("tersor.search.compress")


def small(num_classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes)),
    ).eval()


def five():
    return small(5)


@pytest.fixture(scope="module")
def few():
    """Fifty images for training, fifteen for validation."""
    drawn = torch.Generator().manual_seed(0)
    pixels = Pixels(
        torch.randint(0, 256, (100, 8, 8, 3), generator=drawn, dtype=torch.uint8),
        torch.arange(100, dtype=torch.int64) % 10,
    )
    parts = (torch.arange(50), torch.arange(50, 65), torch.arange(65, 100))
    train, validation, test = (View(pixels, part) for part in parts)
    return Splits(train, validation, test, tuple("0123456789"), (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch):
    monkeypatch.setattr(latency, "_MIN_GROUPS", 2)


@pytest.fixture(scope="module")
def without_time(few, tmp_path_factory):
    """A search without time for any candidate."""
    out = tmp_path_factory.mktemp("search") / "out"
    progress = RecordedProgress()
    result = tersor.compress(small(), few, budget=Budget(minutes=0.001), out=out, progress=progress)
    return result, progress


def test_a_search_without_time_returns_a_usable_result(few, without_time, tmp_path):
    result, progress = without_time
    file = result.best.export(tmp_path / "best.onnx")
    logits = open_session(file, "onnxruntime").run(np.zeros((2, 3, 8, 8), np.float32))
    assert logits.shape == (2, 10)
    assert result.best.point.free
    assert result.best.point.test is not None
    printed_lines = "\n".join(progress.lines)
    assert "free baselines: " in printed_lines
    assert "int8" in printed_lines
    assert "plan:" in printed_lines
    assert result.numbers == read_front(result.folder)
    assert (result.folder / "report.html").is_file()


def test_the_free_baselines_agree_with_their_files(few, without_time):
    result, _ = without_time
    numbers, folder = result.numbers, SearchFolder(result.folder, _arguments(result.folder))
    assert (numbers.runtime, numbers.minutes, numbers.original) == ("onnxruntime", 0.001, "original")
    assert (numbers.validation_images, numbers.test_images) == (15, 35)
    files = {point.name: point.file for point in numbers.baselines}
    assert files.keys() == {"original", "original-openvino", "original-8bit", "original-8bit-openvino"}
    assert files["original-8bit-openvino"] == "baselines/int8-openvino.onnx"
    images = (few.validation.take(torch.arange(15)).float() / 255 - 0.5) / 0.3
    right = {}
    for point in numbers.baselines:
        file = folder.path / point.file
        logits = open_session(file, point.runtime).run(images.contiguous().numpy())
        right[point.name] = logits.argmax(1) == few.validation.targets.numpy()
        assert point.validation == pytest.approx(100 * right[point.name].mean())
        assert point.bytes == file.stat().st_size
        assert point.macs == 16 * 64 * 27 + 32 * 9 * 144 + 320
        assert list(point.latency_ms) == [1, 128]
        assert min(point.latency_ms.values()) > 0
        assert point.free
    original, integers = (numbers.point(name) for name in ("original", "original-8bit"))
    assert folder.original_right.tolist() == right["original"].tolist()
    changes = [*(right["original-8bit"].astype(float) - right["original"]), 1.0, -1.0]
    assert integers.drop_error == pytest.approx(100 * np.std(changes) / 15**0.5, abs=1e-3)
    assert original.drop_error == 0
    assert (original.precision, integers.precision) == ("float32", "int8")
    assert (original.description, integers.description) == ("the original", "the 8-bit original")
    costs = folder.state.costs
    assert costs.runs == pytest.approx(sum(original.latency_ms.values()) / 1000)
    assert min(costs.finish, costs.export, costs.test, costs.step) > 0
    assert folder.state.finished
    assert not folder.state.extended
    assert folder.state.seen is False


def _arguments(folder):
    return json.loads((folder / "search.json").read_text())["arguments"]


def test_two_points_can_be_compared_by_layers_classes_and_times(without_time):
    evidence = read_evidence(without_time[0].folder)
    assert not undocumented(evidence, "evidence.json of a search")
    assert set(evidence["points"]) == {"original", "original-8bit"}
    floats, integers = (evidence["points"][name] for name in ("original", "original-8bit"))
    assert [layer[:3] for layer in floats["layers"]] == [["0", 16, 32], ["3", 32, 32], ["8", 10, 32]]
    assert [layer[:3] for layer in integers["layers"]] == [["0", 16, 8], ["3", 32, 8], ["8", 10, 8]]
    assert all(ms > 0 for layer in [*floats["layers"], *integers["layers"]] for ms in layer[3].values())
    assert len(floats["by_class"]) == 10
    assert floats["agreement"]["original"] == 100
    assert floats["agreement"]["original-8bit"] == integers["agreement"]["original"]
    assert "QLinearConv" in {kind for kind, _, _ in integers["time"]["1"]}
    assert {(peak["runtime"], peak["precision"]) for peak in evidence["peaks"]} >= {("onnxruntime", "int8")}


def test_repeating_the_call_of_a_finished_search_does_nothing(few, without_time):
    result, _ = without_time
    progress = RecordedProgress()
    again = tersor.compress(small(), few, budget=Budget(minutes=0.001), out=result.folder, progress=progress)
    assert again == result
    assert progress.lines == [f"{result.folder}: the search is complete. {compress._LONGER}"], (
        "the command prints the last line"
    )


def test_only_more_minutes_extend_a_finished_search(few, without_time, tmp_path, monkeypatch):
    """Also if the search ended early and used only a part of its minutes."""
    out = tmp_path / "out"
    shutil.copytree(without_time[0].folder, out)
    file = out / "search.json"
    state = json.loads(file.read_text())
    assert state["minutes"] == 0.001
    file.write_text(json.dumps(state | {"minutes": 45.0, "used": 60.0}))

    def extended(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "_search", extended)
    for minutes in (45.0, 44.0):
        progress = RecordedProgress()
        tersor.compress(small(), few, budget=Budget(minutes=minutes), out=out, progress=progress)
        assert progress.lines[-1].endswith(f"the search is complete. {compress._LONGER}")
    with pytest.raises(KeyboardInterrupt):
        tersor.compress(small(), few, budget=Budget(minutes=45.1), out=out)


def test_an_interrupted_extension_is_resumed_with_the_same_minutes(few, without_time, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(without_time[0].folder, out)

    def pressed(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "feasible_range", pressed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tersor.compress(small(), few, budget=Budget(minutes=0.002), out=out)


def test_messages_name_the_python_argument_next_to_the_option():
    """Everything below the command line can also be called from Python."""
    source = Path(tersor.__file__).parent
    files = [*(source / "search").glob("*.py"), source / "core/resources.py", source / "checkpoint/store.py"]
    for file in files:
        for line in file.read_text().splitlines():
            options = re.findall(r"(?<!`)--[a-z][a-z-]*", line)
            assert not options or "`ray start --head`" in line, f"{file.name}: {line.strip()}"
    assert "`minutes` (`--time`)" in compress._LONGER


def test_different_arguments_for_the_same_folder_raise(few, without_time):
    result, _ = without_time
    with pytest.raises(InputError, match="belongs to a search with budget"):
        tersor.compress(small(), few, budget=Budget(max_drop=3, minutes=0.001), out=result.folder)


def test_pick_works_without_training(without_time):
    result, _ = without_time
    fastest = min(result.front, key=lambda point: point.latency_ms[1])
    chosen = result.pick(max_drop=100)
    assert chosen.point == min(result.front, key=lambda point: point.mean_ms)
    assert chosen.file.is_file()
    assert result.pick(latency_ms={1: fastest.latency_ms[1] / 2}).shortfall
    with pytest.raises(InputError, match="not measured at batch 7"):
        result.pick(latency_ms={7: 1.0})


def test_the_pick_command_writes_the_chosen_file(without_time, tmp_path, monkeypatch, capfd):
    result, _ = without_time
    out = tmp_path / "picked.onnx"
    monkeypatch.setattr(sys, "argv", ["tersor", "pick", str(result.folder), "--max-drop", "100", "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert out.is_file()
    assert "budget: at most 100 points lost" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ([], "No network has been exported yet, so nothing was saved. To start again: "),
        ([MODEL], "No network has been exported yet, so nothing was saved. To start again: "),
        ([STATE, MODEL], "{0} holds the search; the best network so far is {0}/model.onnx. To resume: "),
        (
            [STATE, MODEL, UNCHANGED],
            "{0} holds the search; {0}/model.onnx is still the original in float32. To resume: ",
        ),
    ],
)
def test_the_message_for_ctrl_c_lists_saved_files_and_how_to_continue(tmp_path, monkeypatch, capfd, files, line):
    def pressed(*_given, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("tersor.search.compress"), "compress", pressed)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"model")
    arguments = ["compress", "net.py:make", "--weights", "w.safetensors", "--data", "digits", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tersor", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130
    assert capfd.readouterr().err == f"interrupted. {line.format(tmp_path)}tersor {' '.join(arguments)}\n"


ONE_FOR_EACH = "Write a list with one number for each channel, as in"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "resnet20"}, "has no weights. Pass weights=FILE \\(`--weights FILE`\\)"),
        ({"students": ["resnet20=missing.safetensors"]}, "missing.safetensors of the student resnet20 not found"),
        ({"storage": "nonsense://x"}, "the database nonsense://x cannot be opened"),
        ({"data": "nonsense"}, "unknown data name"),
        ({"runtime": "tensorrt"}, "runtime"),
        ({"augment": "rotate"}, "augment"),
        ({"students": ["resnet2"]}, "the student resnet2 cannot be used: unknown model"),
        ({"students": [f"{__name__}:five"]}, "five cannot be used: for two images the student returns"),
        ({"students": [nn.ReLU()]}, r"^students contains an object of type ReLU\. Pass names"),
        ({"students": "resnet20"}, r"Pass a list of names: \['resnet20'\]"),
        ({"pixels": 24}, r"^pixels is 24\. Pass a list of numbers: \[24\]\.$"),
        ({"mean": 0.5, "std": 0.5}, rf"^mean is 0\.5\. {ONE_FOR_EACH} mean="),
        ({"mean": [0.5] * 3, "std": 0.5}, rf"^std is 0\.5\. {ONE_FOR_EACH} std="),
        ({"data": "digits", "limit": "few"}, "^limit should be a whole number, got 'few'\\.$"),
        ({"image_size": 8.5}, r"^image_size is 8\.5\. Write 1 or more pixels"),
        ({"budget": {"max_drop": 1}}, r"budget is of type dict\. Pass"),
        ({"task": 5}, "task is of type int"),
        ({"data": [1]}, r"data is of type list\. Pass"),
        ({"pixels": [24, 0]}, r"pixels is 0\. Write"),
        ({"data": "missing.csv"}, r"missing\.csv"),
    ],
)
def test_wrong_arguments_raise_one_error(few, tmp_path, changed, message):
    given = {"model": small(), "data": few, "out": tmp_path / "out", "budget": Budget(minutes=0.001)} | changed
    with pytest.raises(InputError, match=message):
        tersor.compress(given.pop("model"), given.pop("data"), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--time", "3"], "the time is '3'"),
        (["--max-drop", "-1"], "max_drop is -1"),
        (["--size", "5"], "the size is '5'"),
        (["--mean", "a"], "--mean is 'a'"),
        (["--image-size", "2.5"], "--image-size is '2.5'"),
        (["--pixels", "2"], "Invalid value for '--pixels'"),
    ],
)
def test_command_line_arguments_are_checked_before_torch_is_imported(monkeypatch, capfd, given, message):
    monkeypatch.setattr(
        sys, "argv", ["tersor", "compress", "net.py:make", "--weights", "w", "--data", "digits", *given]
    )
    monkeypatch.setitem(sys.modules, "tersor.search.compress", None)  # its import fails
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err


def test_a_latency_limit_without_a_batch_size_is_for_batch_1():
    assert str(Budget(latency_ms=parse_latency(["2ms"]))) == "2 ms at batch 1"


def test_latency_limits_can_be_in_one_option_or_several():
    assert parse_latency(["1:2ms,128:8ms"]) == parse_latency(["2ms", "128:8ms"]) == {1: 2.0, 128: 8.0}
    assert parse_latency([]) == {}
    with pytest.raises(InputError, match="the latency has two limits for batch size 1"):
        parse_latency(["2ms", "1:3ms"])
    with pytest.raises(InputError):
        parse_latency([""])


def test_other_commands_find_the_files_of_a_search(without_time):
    folder = without_time[0].folder
    found = read_artifact(folder)
    assert found.model == folder / "model.onnx"
    assert found.files["original.onnx"] == folder / UNCHANGED


def test_pick_raises_if_the_search_measured_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "search.json").write_text("{}")
    with pytest.raises(InputError, match="stopped before it had measured anything"):
        read_front(tmp_path / "out")


def test_the_unchanged_original_has_no_recipe_file(without_time, tmp_path):
    point = without_time[0].numbers.baselines[0]
    folder = SearchFolder(tmp_path / "out", {})
    for name in (UNCHANGED, "points/a/model.onnx"):
        (folder.path / name).parent.mkdir(parents=True)
        (folder.path / name).write_text(name)
        (folder.path / name).with_name(RECIPE).write_text("recipe")
    for file, kept in ((UNCHANGED, False), ("points/a/model.onnx", True), (UNCHANGED, False)):
        folder.hand_over(point.model_copy(update={"file": file}))
        assert (folder.path / MODEL).read_text() == file
        assert (folder.path / RECIPE).is_file() == kept


def test_a_folder_with_other_files_is_not_overwritten(few, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        tersor.compress(small(), few, out=tmp_path)


def test_a_search_restarted_with_other_arguments_prints_them(few, tmp_path, monkeypatch):
    module, progress = importlib.import_module("tersor.search.compress"), RecordedProgress()

    def interrupted(*_):
        (tmp_path / "out" / "model.onnx").write_text("exported")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_search", interrupted)
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            tersor.compress(small(), few, seed=seed, out=tmp_path / "out", progress=progress)
    (line,) = progress.lines
    assert line.endswith(
        "out holds an interrupted search with seed '0', but '1' is given. It had measured nothing, so the "
        "search starts from scratch."
    )


@pytest.mark.slow
def test_validation_images_that_the_original_was_trained_on_are_replaced(few, tmp_path, monkeypatch):
    metrics = iter([10.0])
    workbench = importlib.import_module("tersor.search.workbench").Workbench
    monkeypatch.setattr(workbench, "test_metric", lambda *_: next(metrics, 50.0))
    monkeypatch.setattr(workbench, "measured", lambda *_: Measured(100.0))
    progress = RecordedProgress()
    result = tersor.compress(small(), few, budget=Budget(minutes=0.001), out=tmp_path / "out", progress=progress)
    assert any("was probably trained on the validation images" in line for line in progress.lines)
    assert result.numbers.tests_chose
    assert result.numbers.validation_images == 17
    assert result.numbers.test_images == 18


@pytest.mark.slow
def test_a_search_on_the_digits_meets_its_budget(tmp_path, monkeypatch, capfd):
    """Four minutes: branches and channels are removed, candidates are trained, and the best recipe is valid."""
    weights = tmp_path / "resnet20.safetensors"
    models.save_weights(models.build("resnet20", 10), weights)
    out = tmp_path / "out"
    arguments = ["compress", "resnet20", "--weights", weights, "--data", "digits", "--latency", "1:1s", "--time", "4m"]
    monkeypatch.setattr(sys, "argv", ["tersor", *map(str, arguments), "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    front = json.loads((out / "front.json").read_text())
    assert front["met"]
    assert any(point["steps"] for point in [*front["points"], *front["dominated"]])
    assert front["dropped"] or len(front["points"]) > 1
    written = recipe.read(out / "recipe.yaml")
    assert written.stages[-1].name == "quantize"
    assert load(name="digits").classes == tuple("0123456789")


def own_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


def share_right(outputs, targets):
    return (outputs.argmax(1) == targets).double().mean()


def test_a_users_metric_and_loss_are_used(few, tmp_path):
    given = {"budget": Budget(minutes=0.001), "loss": own_loss, "out": tmp_path / "out"}
    result = tersor.compress(small(), few, metric=share_right, **given)
    assert result.numbers.metric == "share_right"
    point = result.numbers.point(result.numbers.original)
    assert point.validation == pytest.approx(100 * round(point.validation / 100 * 15) / 15), "in percent of 15 images"
    with pytest.raises(InputError, match=r"belongs to a search with metric 'share_right', but none is given"):
        tersor.compress(small(), few, **given)


def test_a_metric_in_percent_raises(few, tmp_path):
    with pytest.raises(InputError, match=r"returned 50\. A search needs a metric from 0 to 1"):
        tersor.compress(small(), few, metric=lambda *_: 50.0, budget=Budget(minutes=0.001), out=tmp_path / "out")


def test_a_point_is_evaluated_with_its_own_normalization(few, without_time, monkeypatch):
    result, _ = without_time
    file = result.folder / result.best.point.file
    loaded = []

    def pretend(**options):
        loaded.append(options)
        return dataclasses.replace(few, mean=options["mean"], std=options["std"])

    monkeypatch.setattr("tersor.data.load", pretend)
    found = evaluate(file, "digits", None, progress=NullProgress())
    assert loaded[0]["mean"] == few.mean
    assert loaded[0]["std"] == few.std
    assert found.score == pytest.approx(result.best.point.test)
