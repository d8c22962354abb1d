"""Files that are timed again: their names, what they hold, and what they are compared with."""

import pytest
import torch
from rich.console import Console
from torch import nn

import tersor
from tersor.checkpoint.artifact import write_folder
from tersor.cli_output import latency_tables
from tersor.deploy.onnx import export
from tersor.evaluation.latency import BATCH_SIZES
from tersor.evaluation.timings import Spread, Timings
from tersor.pipeline import bench as module


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)).eval()


def printed(table: module.LatencyTable) -> str:
    """The text of a table, wide enough for every title."""
    console = Console(width=400)
    with console.capture() as capture:
        console.print(*latency_tables(table, 1.0))
    return capture.get()


@pytest.fixture
def equal_times(monkeypatch):
    """Every file takes 1 ms, in the only runtime."""
    monkeypatch.setattr(module, "installed_runtimes", lambda: ["onnxruntime"])
    monkeypatch.setattr(
        module,
        "measure_latency",
        lambda contenders, _example, **_options: Timings(
            {name: {size: [[1.0], [1.0]] for size in BATCH_SIZES} for name in contenders},
            dict.fromkeys(BATCH_SIZES, "time"),
        ),
    )


def test_files_are_timed_against_the_first_of_them_under_their_own_names(tmp_path, monkeypatch):
    for name in ("one", "two"):
        export(network(2), torch.rand(1, 3, 8, 8), tmp_path / f"{name}.onnx")
    one, two = (str(tmp_path / f"{name}.onnx") for name in ("one", "two"))
    monkeypatch.setattr(module, "installed_runtimes", lambda: ["onnxruntime"])

    def latency(contenders, example, *, ratios, seconds):
        assert example.shape == (1, 3, 8, 8)
        ms = {name: 2.0 if "one" in name else 1.0 for name in contenders}
        groups = {
            name: {size: [[value], [1.01 * value], [0.99 * value]] for size in BATCH_SIZES}
            for name, value in ms.items()
        }
        timings = Timings(groups, dict.fromkeys(BATCH_SIZES, "interval"))
        assert [round(ratio.value, 6) for ratio in ratios(timings, 1)] == [2, 2], (
            "in ONNX Runtime and in its fastest runtime"
        )
        return timings

    monkeypatch.setattr(module, "measure_latency", latency)
    tables = list(module.timed([tmp_path / "one.onnx", tmp_path / "two.onnx"], 1.0))
    assert [(each.batch_size, each.rounds, each.ended_by) for each in tables] == [
        (size, 3, "interval") for size in BATCH_SIZES
    ]
    for each in tables:
        first, second = each.files
        assert (first.file, second.file) == (one, two)
        assert (first.runtime, first.precision, first.latency_ms.median) == ("onnxruntime", "float32", 2.0)
        assert (first.roles, first.speedup) == (["first", "first_fastest"], {})
        assert {name: round(ratio.value, 6) for name, ratio in second.speedup.items()} == {
            "first": 2,
            "first_fastest": 2,
        }
    text = printed(tables[0])
    assert "vs. one.onnx in onnxruntime" in text
    assert "vs. one.onnx in its fastest runtime" in text
    assert "original" not in text
    assert "baseline" not in text


def test_files_for_other_images_are_timed_apart(tmp_path, monkeypatch):
    for size in (8, 16):
        export(network(2), torch.rand(1, 3, size, size), tmp_path / f"{size}.onnx")
    shapes = []

    def latency(contenders, example, **_options):
        shapes.append((example.shape, [name.rpartition("/")[2].split(".")[0] for name in contenders]))
        return Timings({name: {size: [[1.0], [1.0]] for size in BATCH_SIZES} for name in contenders},
                       dict.fromkeys(BATCH_SIZES, "time"))  # fmt: skip

    monkeypatch.setattr(module, "measure_latency", latency)
    monkeypatch.setattr(module, "installed_runtimes", lambda: ["onnxruntime"])
    tables = list(module.timed([tmp_path / "8.onnx", tmp_path / "16.onnx"], 1.0))
    assert shapes == [((1, 3, 8, 8), ["8"]), ((1, 3, 16, 16), ["16"])]
    assert len(tables) == 6


@pytest.mark.usefixtures("equal_times")
def test_the_precision_is_what_the_file_holds(tmp_path):
    images = torch.rand(8, 3, 8, 8)
    export(network(2), images, tmp_path / "float.onnx")
    for bits in (8, 4):
        model = network(2) if bits == 8 else wide()
        tersor.export(tersor.quantize(model, images, bits=bits), images, tmp_path / f"{bits}.onnx")
    table = next(module.timed([tmp_path / f"{name}.onnx" for name in ("8", "4", "float")], 1.0))
    assert [each.precision for each in table.files] == [
        "int8",
        "int4 and int8",
        "float32",
    ]


def wide() -> nn.Module:
    """A network with a layer between the first and the last, which 4 bits leave in 8 bits."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), *network(2)[1:]).eval()


@pytest.mark.usefixtures("equal_times")
def test_the_files_of_a_folder_are_compared_with_its_original(tmp_path):
    def fill(folder):
        for name in ("original", "model"):
            export(network(2), torch.rand(1, 3, 8, 8), folder / f"{name}.onnx")

    folder = write_folder(tmp_path / "out", fill)
    table = next(module.timed([folder], 1.0))
    assert [each.roles for each in table.files] == [["original", "baseline"], []]
    assert [each.file for each in table.files] == [str(folder / "original.onnx"), str(folder / "model.onnx")]
    text = printed(table)
    assert "vs. original" in text
    assert "vs. baseline" in text
    assert ".onnx in" not in text


@pytest.mark.usefixtures("equal_times")
def test_files_beside_a_folder_are_compared_with_its_files(tmp_path):
    def fill(folder):
        for name in ("original", "model"):
            export(network(2), torch.rand(1, 3, 8, 8), folder / f"{name}.onnx")

    folders = [write_folder(tmp_path / name, fill) for name in ("one", "two")]
    mine, other_size = tmp_path / "mine.onnx", tmp_path / "16.onnx"
    export(network(2), torch.rand(1, 3, 8, 8), mine)
    export(network(2), torch.rand(1, 3, 16, 16), other_size)
    model = folders[0] / "model.onnx"
    given = [other_size, mine, folders[0], model, folders[1], folders[1], mine]
    tables = list(module.timed(given, 1.0))
    assert [each.images for each in tables] == [
        *["float32 images of 3 x 8 x 8"] * len(BATCH_SIZES),
        *["float32 images of 3 x 16 x 16"] * len(BATCH_SIZES),
    ]
    found = {each.file: (each.roles, list(each.speedup)) for each in tables[0].files}
    assert found == {
        str(folders[0] / "original.onnx"): (["original", "baseline"], []),
        str(model): (["model"], ["original", "baseline"]),
        str(mine): ([], ["original", "baseline", "model"]),
        str(folders[1] / "original.onnx"): (["original", "baseline"], []),
        str(folders[1] / "model.onnx"): ([], ["original", "baseline"]),
    }
    assert len(tables[0].files) == len(found)
    text = printed(tables[0])
    assert f"batch 1, compared with {model} in onnxruntime" in text
    assert text.count(str(mine)) == 2
    assert "compared with" not in printed(tables[-1])


@pytest.mark.usefixtures("equal_times")
def test_the_artifact_that_files_are_compared_with_runs_in_the_runtime_of_its_recipe(tmp_path, monkeypatch):
    def fill(folder):
        for name in ("original", "model"):
            export(network(2), torch.rand(1, 3, 8, 8), folder / f"{name}.onnx")
        (folder / "numbers.json").write_text('{"runtime": "openvino"}')

    pytest.importorskip("openvino")
    monkeypatch.setattr(module, "installed_runtimes", lambda: ["onnxruntime", "openvino"])
    folder = write_folder(tmp_path / "out", fill)
    export(network(2), torch.rand(1, 3, 8, 8), tmp_path / "mine.onnx")
    table = next(module.timed([folder, tmp_path / "mine.onnx"], 1.0))
    assert [each.runtime for each in table.files if "model" in each.roles] == ["openvino"]
    assert [each.runtime for each in table.files if "model" in each.speedup] == [
        "onnxruntime", "onnxruntime", "openvino",
    ]  # fmt: skip


@pytest.mark.usefixtures("equal_times")
def test_a_file_of_any_name_is_timed_alone(tmp_path):
    export(network(2), torch.rand(1, 3, 8, 8), tmp_path / "original.onnx")
    (file,) = next(module.timed([tmp_path / "original.onnx"], 1.0)).files
    assert (file.file, file.roles) == (str(tmp_path / "original.onnx"), ["first", "first_fastest"])


def test_each_column_names_the_row_that_it_compares_with():
    spread = Spread.of([1.0])
    files = [
        module.TimedFile("a.onnx", 1, "onnxruntime", "float32", spread, [role], {})
        for role in ("first", "first_fastest")
    ]
    rows = [
        line for line in printed(module.LatencyTable(1, 2, "time", files, "images")).splitlines() if "a.onnx, " in line
    ]
    assert [[cell.strip() for cell in row.split("│")[4:6]] for row in rows] == [["this file", ""], ["", "this file"]]
