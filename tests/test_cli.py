"""The command line: one run end to end, and mistakes of users: one error message, exit code 2, no lost files."""

import importlib
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tersor import cli, models
from tersor.cli_output import Document, plain_console, schema_of, sensitivity_table, show
from tersor.core.errors import InputError
from tersor.evaluation import latency
from tersor.methods import get, names
from tersor.pipeline.sensitivity_analysis import BitCosts
from tersor.progress_bars import Bars
from tersor.quantization.sensitivity import Cost
from tersor.recipe import parameters

RECIPE = """\
model: {name: resnet20, weights: WEIGHTS}
data: {name: digits}
target: {input: uint8}
stages:
  - {name: quantize, methods: [{ptq: {calibration_images: 64}}]}
"""
LATE = "  - {name: b, methods: [{ptq: {exclude: [nothing]}}]}"


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ([], "There is no checkpoint yet, so nothing was saved. To start again: {} --resume"),
        (
            ["out.checkpoints/a"],
            "out.checkpoints holds the progress; there is no model.onnx yet. To resume: {} --resume",
        ),
        (
            ["out.checkpoints/a", "out/manifest.json"],
            "out is complete; its network is out/model.onnx. To print the results: {} --resume",
        ),
    ],
)
def test_the_message_for_ctrl_c_lists_what_was_saved_and_how_to_continue(written, line, tmp_path, monkeypatch, capfd):
    def pressed(*_given, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("tersor.pipeline.run"), "run", pressed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my recipe.yaml").write_text(RECIPE)
    for name in written:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    command = ("run", "my recipe.yaml", "--out", "out", "--set", "seed=3")
    again = "tersor run 'my recipe.yaml' --out out --set seed=3"
    output = f"interrupted. {line.format(again)}\n"
    assert tersor(monkeypatch, *command) == 130
    assert capfd.readouterr().err == output
    assert tersor(monkeypatch, *command, "--resume") == 130
    assert capfd.readouterr().err == output, "the option is not repeated"


def test_a_run_keeps_freed_memory(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("tersor.core.device.keep_freed_memory", lambda: done.append("allocator"))

    def run(*_given, **_options):
        done.append("run")
        raise InputError("far enough")

    monkeypatch.setattr(importlib.import_module("tersor.pipeline.run"), "run", run)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert tersor(monkeypatch, "run", recipe) == 2
    assert done == ["allocator", "run"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    models.save_weights(models.build("resnet20", 10), path)
    return path


def tersor(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tersor", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_a_permission_error_is_shown_in_one_line(monkeypatch, capsys, tmp_path):
    def app():
        raise PermissionError(13, "Permission denied", str(tmp_path / "cat.png"))

    monkeypatch.setattr(cli, "app", app)
    assert tersor(monkeypatch, "methods") == 2
    assert capsys.readouterr().err.strip() == (
        f"error: {tmp_path / 'cat.png'}: Permission denied. Check the path and the permissions."
    )


def test_an_oserror_without_a_file_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    monkeypatch.setattr(sys, "argv", ["tersor", "methods"])
    with pytest.raises(OSError, match="Input/output error"):
        cli.main()


def document(text, name):
    """The JSON document, checked against its schema: its keys are the properties of the schema."""
    value, schema = json.loads(text), schema_of(name)
    first = value[0] if isinstance(value, list) else value
    if schema.get("type") == "array":
        schema = schema["$defs"][schema["items"]["$ref"].rpartition("/")[2]]
    assert set(schema["required"]) <= set(first) <= set(schema["properties"])
    return value


def small(num_classes):
    """A network that is exported much faster than a ResNet-20; other random weights could fail a check."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 128, 3, stride=2, bias=False), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes)),
    )


def test_a_run_writes_the_folder_with_every_figure(tmp_path, monkeypatch, capfd):
    module = importlib.import_module("tersor.pipeline.run")
    monkeypatch.setattr(module, "measure", partial(module.measure, seconds=0.2))
    monkeypatch.setattr(latency, "_MIN_GROUPS", 2)
    recipe = tmp_path / "recipe.yaml"
    weights = tmp_path / "small.safetensors"
    models.save_weights(small(10), weights)
    recipe.write_text(RECIPE.replace("WEIGHTS", str(weights)).replace("name: resnet20", f'name: "{__name__}:small"'))
    out = tmp_path / "out"
    assert tersor(monkeypatch, "run", recipe, "--out", out, "--json") == 0
    printed = capfd.readouterr()
    assert document(printed.out, "results") == json.loads((out / "numbers.json").read_text())
    written = f"written: {out}; model.onnx takes uint8 images of 3 x 8 x 8"
    assert written.replace(" ", "") in printed.err.replace("\n", "").replace(" ", "")
    assert {
        "model.safetensors",
        "structure.json",
        "model.onnx",
        "original.onnx",
        "recipe.yaml",
        "numbers.json",
        "manifest.json",
        "report.html",
    } <= {path.name for path in out.iterdir()}
    numbers = json.loads((out / "numbers.json").read_text())
    assert {"runtime", "machine", "seed", "date", "original", "candidates", "baseline", "artifact"} <= set(numbers)
    for entry in (numbers["original"], numbers["artifact"]):
        for key in ("parameters", "macs", "bit_operations", "peak_memory_bytes", "load_ms", "bytes"):
            assert entry[key] > 0, key
        assert {"score", "agreement", "sparsity"} <= set(entry)
        assert all(entry["latency_ms"][size]["median"] > 0 for size in ("1", "32", "128"))
    assert numbers["original"]["agreement"] == 100
    assert numbers["artifact"]["bytes"] < numbers["original"]["bytes"] / 3
    assert numbers["artifact"]["bit_operations"] * 16 == numbers["original"]["bit_operations"]
    assert numbers["agreement_with_torch"] >= 99
    assert (numbers["artifact"]["precision"], numbers["original"]["precision"]) == ("int8", "float32")
    assert (numbers["artifact"]["integer_macs_share"], numbers["artifact"]["float_operators"]) == (1.0, [])
    assert not list(tmp_path.glob("*.checkpoints"))
    assert not list(tmp_path.glob("*.partial*"))
    capfd.readouterr()
    assert tersor(monkeypatch, "eval", out) == 0
    artifact = numbers["artifact"]
    assert f"{artifact['score']:.2f} ± {artifact['score_error']:.2f} % on 359 test" in capfd.readouterr().out
    assert tersor(monkeypatch, "eval", out, "--json") == 0
    output = capfd.readouterr()
    assert document(output.out, "eval")["score"] == numbers["artifact"]["score"]
    assert " 359 test images" in output.err
    # the run above used every runtime
    monkeypatch.setattr(importlib.import_module("tersor.pipeline.bench"), "installed_runtimes", lambda: ["onnxruntime"])
    assert tersor(monkeypatch, "bench", out, out / "model.onnx", "--seconds", 0.1) == 0
    table = capfd.readouterr().out
    assert table.count("onnxruntime") == 6, "two files at three batch sizes: one is given twice"
    assert table.count(" rounds, until ") == 3
    assert tersor(monkeypatch, "bench", out, "--seconds", 0.1, "--json") == 0
    tables = document(capfd.readouterr().out, "bench")
    assert [each["batch_size"] for each in tables] == [1, 32, 128]
    for each in tables:
        assert [file["roles"] for file in each["files"]] == [["original", "baseline"], []]
        assert set(each["files"][1]["speedup"]) == {"original", "baseline"}
    assert set(numbers["speedup"]) == {"original", "baseline"}
    for size in ("1", "32", "128"):
        baseline = numbers["baseline"][size]
        assert numbers["candidates"][baseline["runtime"]]["precision"] == baseline["precision"]
        assert numbers["rounds"]["ended_by"][size] in {"interval", "time"}
        for ratios in numbers["speedup"].values():
            assert 0 < ratios[size]["low"] <= ratios[size]["value"] <= ratios[size]["high"]
    assert tersor(monkeypatch, "run", recipe, "--out", out) == 2
    assert "already exists" in capfd.readouterr().err


def test_a_run_without_latency_is_complete_except_for_latency(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(latency, "_MIN_GROUPS", 2)
    recipe, weights, out = (tmp_path / name for name in ("recipe.yaml", "small.safetensors", "out"))
    models.save_weights(small(10), weights)
    recipe.write_text(RECIPE.replace("WEIGHTS", str(weights)).replace("name: resnet20", f'name: "{__name__}:small"'))
    command = ("run", recipe, "--out", out, "--no-latency", "--json")
    assert tersor(monkeypatch, *command) == 0
    printed = capfd.readouterr()
    numbers = document(printed.out, "results")
    assert (numbers["latency_measured"], numbers["speedup"], numbers["baseline"]) == (False, {}, {})
    assert numbers["artifact"]["difference_error"] > 0
    assert "Latency was not measured" in " ".join(printed.err.split())
    assert "faster" not in printed.err
    before = (out / "report.html").read_bytes()
    assert tersor(monkeypatch, "report", out) == 0
    assert (out / "report.html").read_bytes() == before
    capfd.readouterr()
    assert tersor(monkeypatch, *command, "--resume") == 0
    assert document(capfd.readouterr().out, "results") == numbers
    assert tersor(monkeypatch, "eval", out, "--json") == 0
    assert document(capfd.readouterr().out, "eval")["score_error"] == numbers["artifact"]["score_error"]
    assert tersor(monkeypatch, "bench", out, "--seconds", 0.1, "--json") == 0
    assert {size["batch_size"] for size in document(capfd.readouterr().out, "bench")} == {1, 32, 128}


def test_the_version_is_printed(monkeypatch, capfd):
    assert tersor(monkeypatch, "--version") == 0
    assert capfd.readouterr().out.strip() == importlib.metadata.version("tersor")


def test_sensitivity_writes_a_file_and_a_figure_and_lists_the_most_sensitive_layers(
    tmp_path, weights, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tersor.pipeline.sensitivity_analysis.WIDTHS", (2, 4))
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("WEIGHTS", str(weights)))
    assert tersor(monkeypatch, "sensitivity", "mine.yaml", "--images", 20) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "mine.sensitivity.json", "mine.sensitivity.svg"}
    output = capfd.readouterr().out
    assert "the 10 most sensitive of 20 layers" in output
    written = json.loads((tmp_path / "mine.sensitivity.json").read_text())
    costs = written["costs"]
    assert written["first_and_last"] == ["conv1", "linear"]
    largest = {
        name: [max(cost[key] for cost in costs if cost["layer"] == name) for key in ("drop", "error")]
        for name in written["weights"]
    }
    worst = max(largest, key=largest.__getitem__)
    shown = next(cost for cost in costs if cost["layer"] == worst)
    rows = [line for line in output.splitlines() if "conv" in line or "linear" in line]
    assert len(rows) == 10
    assert worst in rows[0]
    assert f"({shown['drop']:z.1f})" in output.splitlines()[output.splitlines().index(rows[0]) + 1]
    assert tersor(monkeypatch, "sensitivity", "mine.yaml", "--images", 20, "--json") == 0
    assert document(capfd.readouterr().out, "sensitivity")["costs"] == costs
    assert tersor(monkeypatch, "sensitivity", "mine.yaml", "--images", 30) == 2
    assert "was measured with images: 20" in capfd.readouterr().err
    (tmp_path / "mine.yaml").write_text(RECIPE.replace(", weights: WEIGHTS", ""))
    assert tersor(monkeypatch, "sensitivity", "mine.yaml") == 2
    assert capfd.readouterr().err.startswith("error: resnet20 has no weights")


def test_the_sensitivity_table_is_sorted_by_the_drop_and_explains_its_8_bit_column(capfd):
    values = {"conv1": (0.5, 0.0), "a": (0.2, -1.0), "b": (0.1, 3.0), "c": (0.9, 3.0), "fc": (0.3, 0.5)}
    costs = [Cost(name, 2, error, drop) for name, (error, drop) in values.items()]
    costs += [Cost(name, 8, 0.001, 0.0) for name in values]
    found = BitCosts(measured_with={}, weights=dict.fromkeys(values, 9), first_and_last=["conv1", "fc"], costs=costs)
    show(plain_console(), sensitivity_table(found))
    output = capfd.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert rows == [
        *(["4", "c", "90", "0.10"], ["", "", "(3.0)", "(0.0)"]),
        *(["3", "b", "10", "0.10"], ["", "", "(3.0)", "(0.0)"]),
        *(["5", "fc *", "30", "0.10"], ["", "", "(0.5)", "(0.0)"]),
        *(["1", "conv1 *", "50", "0.10"], ["", "", "(0.0)", "(0.0)"]),
        *(["2", "a", "20", "0.10"], ["", "", "(-1.0)", "(0.0)"]),
    ]
    text = " ".join(output.split())
    assert "(0.0) is a difference below 0.05, which is common at 8 bits" in text
    assert "* The first and last layer: ptq keeps them at 8 bits" in text


def test_the_sensitivity_table_without_labels_has_no_drop(capfd):
    costs = [Cost("a", 2, 0.1, None), Cost("b", 2, 0.2, None)]
    show(plain_console(), sensitivity_table(BitCosts(measured_with={}, weights={"a": 1, "b": 1}, costs=costs)))
    rows = [line.split("│")[1:-1] for line in capfd.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [["2", "b", "20"], ["1", "a", "10"]]


def test_interrupting_sensitivity_prints_how_to_continue(tmp_path, monkeypatch, capfd):
    def pressed(*_given, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tersor.pipeline.sensitivity_analysis.measure", pressed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    command = f"tersor sensitivity {recipe} --out a.json\n"
    assert tersor(monkeypatch, "sensitivity", recipe, "--out", "a.json") == 130
    assert capfd.readouterr().err == f"interrupted. Nothing has been measured yet. To start again: {command}"
    (tmp_path / "a.json").touch()
    assert tersor(monkeypatch, "sensitivity", recipe, "--out", "a.json") == 130
    assert capfd.readouterr().err == f"interrupted. a.json holds the measurements so far. To resume: {command}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("WEIGHTS", "absent.safetensors"), "weights file absent.safetensors"),
        (("WEIGHTS", "."), "weights file . is a folder"),
        (("WEIGHTS", "OTHER"), "resnet32"),
        (("WEIGHTS", "CORRUPT"), "corrupt.safetensors"),
        (("name: resnet20", "name: resnet20, num_classes: 7"), "classes"),
        (("name: resnet20", "name: resnt20"), "Did you mean 'resnet20'"),
        (("name: digits", "folder: nowhere"), "nowhere"),
        (("data:", "dota:"), "line 2"),
        (("ptq:", "ptk:"), "unknown method 'ptk'"),
        (("calibration_images: 64", "bits: 0"), "line 5"),
        (("calibration_images: 64", "exclude: [layer9]"), "matches no layer"),
        (
            ("{name: quantize, methods: [{ptq: {calibration_images: 64}}]}", "{name: a, steps: 1}\n" + LATE),
            "matches no layer",
        ),
        (("ptq: {calibration_images: 64}", "soft_targets: {temperature: 0}"), "temperature"),
        (("methods: [{ptq: {calibration_images: 64}}]", "steps: 1, methods: [soft_targets]"), "teacher"),
        (("ptq: {calibration_images: 64}", "weight_pruning: {sparsity: 1.2}"), "less than 1, got 1.2"),
        (("ptq: {calibration_images: 64}", "channel_pruning: {keep_macs: 0}"), "greater than 0, got 0"),
        (("[{ptq: {calibration_images: 64}}]", "[ptq, weight_pruning]"), "masks come before quantizers"),
        (
            ("[{ptq: {calibration_images: 64}}]", "[weight_pruning, channel_pruning]"),
            "channel_pruning must come before that",
        ),
        (("ptq: {calibration_images: 64}", "channel_pruning: {exclude: ['*']}"), "no channel of"),
    ],
)
def test_recipes_that_cannot_be_used_give_one_error_message(change, message, tmp_path, weights, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrupt.safetensors").write_bytes(weights.read_bytes()[:1000])
    models.save_weights(models.build("resnet32", 10), tmp_path / "other.safetensors")
    text = RECIPE.replace(*change).replace("WEIGHTS", str(weights))
    text = text.replace("OTHER", "other.safetensors").replace("CORRUPT", "corrupt.safetensors")
    (tmp_path / "recipe.yaml").write_text(text)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert tersor(monkeypatch, "run", "recipe.yaml", "--out", "out") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", ["", "- a\n- list\n", "a: [1,\n", "just text"])
def test_invalid_recipe_files_give_an_error_message(content, tmp_path, monkeypatch, capfd):
    (tmp_path / "recipe.yaml").write_text(content)
    assert tersor(monkeypatch, "run", tmp_path / "recipe.yaml", "--out", tmp_path / "out") == 2
    assert capfd.readouterr().err.startswith("error: ")


def test_images_that_cannot_be_used_are_named_in_the_error(tmp_path, weights, monkeypatch, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("WEIGHTS", str(weights)).replace("name: digits", "folder: " + str(tmp_path / "d")))
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder = tmp_path / "d" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    cut = tmp_path / "d" / "train" / "bee" / "2.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    assert tersor(monkeypatch, "run", recipe, "--out", tmp_path / "out") == 2
    assert str(cut) in capfd.readouterr().err
    for file in cut.parent.iterdir():
        file.unlink()
    assert tersor(monkeypatch, "run", recipe, "--out", tmp_path / "out") == 2
    assert "bee" in capfd.readouterr().err


def test_a_missing_runtime_gives_an_error_message(tmp_path, weights, monkeypatch, capfd):
    def absent(name: str) -> None:
        raise InputError(f"the runtime {name} is not installed. Write pip install openvino.")

    monkeypatch.setattr("tersor.pipeline.setup.load_runtime", absent)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("WEIGHTS", str(weights)))
    assert tersor(monkeypatch, "run", tmp_path / "recipe.yaml", "--out", tmp_path / "out") == 2
    assert "not installed" in capfd.readouterr().err


def test_explain_and_methods_do_not_train(tmp_path, weights, monkeypatch, capfd):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("WEIGHTS", str(weights)))
    monkeypatch.chdir(tmp_path)
    assert tersor(monkeypatch, "run", "recipe.yaml", "--explain") == 0
    output = capfd.readouterr().out
    assert "269,722 parameters" in output
    assert "in float" not in output
    excluding = ("--set", "stages.0.methods.0.ptq.exclude=[layer1]")
    assert tersor(monkeypatch, "run", "recipe.yaml", "--explain", *excluding) == 0
    output = " ".join(capfd.readouterr().out.split())
    assert "in float (reason: excluded): layer1.0.conv1 (5.8 % of the MACs)" in output
    assert "warning: only 65.1 % of the MACs are computed in integers" in output
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert tersor(monkeypatch, "methods", "ptq") == 0
    assert "activation_bits" in capfd.readouterr().out
    assert tersor(monkeypatch, "methods") == 0
    output = capfd.readouterr().out
    assert "These cannot:\n  adaround: rounding changes the network even at 8 bits\n  brecq: " in output


@pytest.mark.parametrize("name", names())
def test_the_description_of_a_method_fits_into_60_columns(name, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "60")
    assert tersor(monkeypatch, "methods", name) == 0
    text = capfd.readouterr().out
    cells = "".join("".join(line.split("│")[4].split()) for line in text.splitlines() if line.startswith("│"))
    for _, _, _, description in parameters(get(name)):
        assert "".join(description.split()) in cells


def test_lines_are_not_wrapped_if_the_output_is_a_file(capfd):
    line = "a warning of more than eighty characters with a [path] in it: " + "x" * 60
    with Bars(plain_console()) as bars:
        bars.say(line)
    assert line in capfd.readouterr().out.splitlines()


def test_the_output_of_a_network_is_not_part_of_the_json_document(monkeypatch, capsys):
    def methods() -> None:
        print("my network says hello")  # noqa: T201
        cli.print_json({"answer": 1})

    monkeypatch.setattr(cli, "app", methods)
    monkeypatch.setattr(sys, "argv", ["tersor", "methods", "--json"])
    cli.main()
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"answer": 1}
    assert "hello" in printed.err


def test_methods_are_printed_as_json(monkeypatch, capfd):
    assert tersor(monkeypatch, "methods", "--json") == 0
    output = json.loads(capfd.readouterr().out)
    assert sorted(output) == list(names())
    assert output["dpf"]["needs_steps"]
    assert output["soft_targets"]["needs_teacher"]
    assert set(output["ptq"]) == set(schema_of("methods")["$defs"]["MethodDescription"]["properties"])
    assert tersor(monkeypatch, "methods", "ptq", "--json") == 0
    output = json.loads(capfd.readouterr().out)
    assert output["ptq"]["parameters"]["properties"]["bits"]["default"] == 8
    assert tersor(monkeypatch, "methods", "ptk", "--json") == 2
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", Document.__args__)
def test_every_json_document_has_a_schema(name, monkeypatch, capfd):
    assert tersor(monkeypatch, "schema", name) == 0
    assert {"$defs", "properties"} & set(json.loads(capfd.readouterr().out))


def test_explain_with_json_is_an_error(tmp_path, monkeypatch, capfd):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert tersor(monkeypatch, "run", tmp_path / "recipe.yaml", "--explain", "--json") == 2
    assert "Leave out --json or --explain" in capfd.readouterr().err


def test_the_recipe_schema_contains_every_method(monkeypatch, capfd):
    assert tersor(monkeypatch, "schema") == 0
    output = capfd.readouterr().out
    assert json.loads(output)["$defs"]["Stage"]
    assert "calibration_images" in output
    assert "temperature" in output


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf"])
def test_an_invalid_time_is_an_error(seconds, monkeypatch, capfd):
    assert tersor(monkeypatch, "bench", "m.onnx", "--seconds", seconds) == 2
    assert "Write a finite number above 0" in capfd.readouterr().err
