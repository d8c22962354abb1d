"""Benchmarking of existing files: the names in the table, the precision, and the reference of each comparison."""

import pytest
import torch
from rich.console import Console
from torch import nn

import tersor
from tersor.checkpoint.artifact import write_folder
from tersor.cli_bench import latency_tables
from tersor.cli_output import show
from tersor.deploy.onnx import export
from tersor.evaluation.latency import BATCH_SIZES
from tersor.evaluation.timings import Ratio, Spread, Timings
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


def test_files_are_compared_with_the_first_file_under_their_own_names(tmp_path, monkeypatch):
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
    (table,) = latency_tables(tables[0], 1.0)
    assert [column.header for column in table.columns][-2:] == [
        "vs. one.onnx in onnxruntime",
        "vs. one.onnx in its fastest runtime",
    ]
    assert "original" not in text
    assert "baseline" not in text


def test_files_with_different_input_sizes_are_timed_separately(tmp_path, monkeypatch):
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
def test_the_precision_is_read_from_the_weights_in_the_file(tmp_path):
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
    """A network with a layer that is quantized to 4 bits: the first and the last layer have 8 bits."""
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
def test_files_are_compared_with_the_files_of_a_folder(tmp_path):
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
        str(folders[1] / "model.onnx"): ([], ["original", "baseline", "model"]),
    }
    assert len(tables[0].files) == len(found)
    text = printed(tables[0])
    assert [each.title for each in latency_tables(tables[0], 1.0)][1:] == [
        f"batch 1, compared with {model} in onnxruntime"
    ]
    assert text.count(str(mine)) == 2
    assert "compared with" not in printed(tables[-1])


@pytest.mark.usefixtures("equal_times")
def test_the_reference_artifact_is_timed_in_the_runtime_of_its_recipe(tmp_path, monkeypatch):
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


def of_one_original(path, runtime="onnxruntime"):
    """The folder of a run; all these folders have the same original."""

    def fill(folder):
        torch.manual_seed(0)
        export(network(2), torch.rand(1, 3, 8, 8), folder / "original.onnx")
        torch.manual_seed(len(path.name))
        export(network(2), torch.rand(1, 3, 8, 8), folder / "model.onnx")
        (folder / "numbers.json").write_text(f'{{"runtime": "{runtime}"}}')

    return write_folder(path, fill)


def test_folders_are_compared_with_the_first_artifact_and_a_shared_original_is_timed_once(tmp_path, monkeypatch):
    opened = []

    def latency(contenders, _example, *, ratios, seconds):
        opened.extend(contenders)
        ms = {name: 3.0 if "mine/model" in name else 2.0 if "mag/model" in name else 6.0 for name in contenders}
        groups = {name: {size: [[each, each], [each, each]] for size in BATCH_SIZES} for name, each in ms.items()}
        timings = Timings(groups, dict.fromkeys(BATCH_SIZES, "interval"))
        assert sorted(round(each.value, 6) for each in ratios(timings, 1)) == [1.5, 2, 2, 3, 3]
        return timings

    monkeypatch.setattr(module, "installed_runtimes", lambda: ["onnxruntime"])
    monkeypatch.setattr(module, "measure_latency", latency)
    mine, mag = of_one_original(tmp_path / "mine"), of_one_original(tmp_path / "mag")
    table = next(module.timed([mine, mag], 1.0))
    assert len(opened) == 3
    original, first, second = table.files
    assert (original.file, original.roles) == (str(mine / "original.onnx"), ["original", "baseline"])
    assert original.copies == [str(mag / "original.onnx")]
    assert (first.file, first.roles, list(first.speedup)) == (
        str(mine / "model.onnx"), ["model"], ["original", "baseline"],
    )  # fmt: skip
    assert (second.file, second.roles) == (str(mag / "model.onnx"), [])
    assert {name: round(each.value, 6) for name, each in second.speedup.items()} == {
        "original": 3, "baseline": 3, "model": 1.5,
    }  # fmt: skip
    assert second.speedup["model"].low < 1.5 < second.speedup["model"].high
    above, below = latency_tables(table, 1.0)
    assert f"{mag / 'original.onnx'} is identical to {mine / 'original.onnx'}" in above.caption
    assert below.title == f"batch 1, compared with {mine / 'model.onnx'} in onnxruntime"
    assert below.columns[-1].header.replace("\n", "") == "vs. mine/model.onnx"
    assert printed(table).count("1.50x faster") == 1


@pytest.mark.usefixtures("equal_times")
def test_a_shared_original_has_a_role_in_each_runtime(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(module, "installed_runtimes", lambda: ["onnxruntime", "openvino"])
    folders = [of_one_original(tmp_path / runtime, runtime) for runtime in ("onnxruntime", "openvino")]
    table = next(module.timed(folders, 1.0))
    originals = [each for each in table.files if each.file == str(folders[0] / "original.onnx")]
    float32 = {each.runtime: each.roles for each in originals if each.precision == "float32"}
    assert [each.runtime for each in originals if each.precision == "float32"] == ["onnxruntime", "openvino"]
    assert all("original" in roles for roles in float32.values())
    assert not [each for each in table.files if each.file == str(folders[1] / "original.onnx")]


def test_file_names_are_not_broken_within_80_columns():
    ratio, spread = Ratio(0.97, 0.9, 1.01, 80, 8), Spread(112.345, 101.111, 123.222, 80)
    speedup = {"original": ratio, "baseline": Ratio(1.05, 1.02, 1.08, 80, 8)}
    names = ["runs/mine/original.onnx", "runs/mine/model.onnx", "runs/resnet56-8bit-from-teacher/model.onnx"]
    files = [
        module.TimedFile(name, 10**6, "onnxruntime", "int8, rest float32", spread, ["model"], speedup) for name in names
    ]
    console = Console(width=80)
    with console.capture() as capture:
        show(console, *latency_tables(module.LatencyTable(1, 80, "time", files, "images"), 1.0))
    lines = capture.get().splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    parts = ["original.onnx", "model.onnx", "runs/resnet56-", "8bit-from-", "teacher/", "1.000 MB"]
    assert all(part in cells for part in parts), cells
    assert all("no measurable" in line for line in lines if "no meas" in line)
    assert any("│ int8,        " in line for line in lines)


@pytest.mark.usefixtures("equal_times")
def test_a_single_file_can_have_any_name(tmp_path):
    export(network(2), torch.rand(1, 3, 8, 8), tmp_path / "original.onnx")
    (file,) = next(module.timed([tmp_path / "original.onnx"], 1.0)).files
    assert (file.file, file.roles) == (str(tmp_path / "original.onnx"), ["first", "first_fastest"])


def test_each_column_names_its_reference_row():
    spread = Spread.of([1.0])
    files = [
        module.TimedFile("a.onnx", 1, "onnxruntime", "float32", spread, [role], {})
        for role in ("first", "first_fastest")
    ]
    rows = [
        line
        for line in printed(module.LatencyTable(1, 2, "time", files, "images")).splitlines()
        if line.startswith("│ a.onnx ")
    ]
    assert [[cell.strip() for cell in row.split("│")[4:6]] for row in rows] == [["this file", ""], ["", "this file"]]
