"""`tersor pick` without limits, and by the name of a point."""

import errno
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from front_samples import SIZES, front_of, point
from rich.console import Console
from torch import nn

from tersor import cli
from tersor.cli_compress import front_tables
from tersor.cli_output import schema_of, show
from tersor.core.errors import InputError
from tersor.deploy.onnx import export
from tersor.search.compression_budget import Budget
from tersor.search.front import front
from tersor.search.result import Choice, Result
from tersor.search.verdict_line import verdict_lines


def test_pick_lists_the_front_and_uses_the_budget_of_the_search(tmp_path, monkeypatch, capfd):
    made = front_of(3)
    limits = {"max_drop": 0.1, "latency_ms": {}, "megabytes": None}
    (original, *_) = (point for point in made.points if point.name == "original")
    made = made.model_copy(update={"limits": limits})
    (tmp_path / "front.json").write_text(made.model_dump_json())
    assert Result(tmp_path, made).pick().point == original
    assert Result(tmp_path, made).pick(max_drop=1).point.name == "best"
    shown = printed(["pick", tmp_path], monkeypatch, capfd)
    assert "budget of the search: at most 0.1 points lost" in shown
    marked = [line for line in shown.splitlines() if "* " in line and "│" in line]
    assert [line.split()[2] for line in marked] == ["original"]
    assert "│ best " in shown
    assert "chosen: original\n" in shown
    assert f"file: {tmp_path / original.file}" in shown


@pytest.mark.parametrize(("lost", "warned"), [(1.6, True), (0.4, False)])
def test_pick_warns_about_a_drop_on_the_test_images_above_the_limit(tmp_path, monkeypatch, capfd, lost, warned):
    made = front_of(3)
    best = made.point("best")
    changed = best.model_copy(update={"test": made.point("original").test - lost})
    points = [changed if each.name == "best" else each for each in made.points]
    (tmp_path / "front.json").write_text(made.model_copy(update={"points": points}).model_dump_json())
    shown = printed(["pick", tmp_path, "--max-drop", "1"], monkeypatch, capfd)
    assert "chosen: best" in shown
    warning = "warning: best loses 1.60 points on the test images, more than the allowed drop of 1 point\n"
    assert (warning in shown) == warned
    assert ("warning" in shown) == warned


@pytest.mark.parametrize(
    ("own", "more_than"),
    [({"max_drop": 0.5}, "the allowed drop of 0.5 points"), ({"megabytes": 9.0}, "1 point (the default limit)")],
)
def test_pick_warns_about_a_drop_even_without_a_given_limit(tmp_path, monkeypatch, capfd, own, more_than):
    made = front_of(3)
    best = made.point("best")
    changed = best.model_copy(update={"test": made.point("original").test - 5})
    limits = {"max_drop": None, "latency_ms": {}, "megabytes": None, **own}
    points = [changed if each.name == "best" else each for each in made.points]
    front = made.model_copy(update={"points": points, "limits": limits})
    (tmp_path / "front.json").write_text(front.model_dump_json())
    size, ms = next(iter(best.latency_ms.items()))
    shown = printed(["pick", tmp_path, "--latency", f"{size}:{1.5 * ms}ms"], monkeypatch, capfd)
    assert "chosen: best" in shown
    assert f"warning: best loses 5.00 points on the test images, more than {more_than}\n" in shown


def test_a_result_is_printed_as_its_verdict(tmp_path):
    made = front_of(3)
    lines = str(Result(tmp_path, made)).splitlines()
    assert lines[:-1] == verdict_lines(made)
    assert lines[-1].startswith("best: ")
    assert f"{tmp_path / 'model.onnx'}" in lines[-1]


def test_an_error_larger_than_the_allowed_drop_is_mentioned(tmp_path):
    made = front_of(3)
    best = made.point(made.best)
    for error, warns in ((0.5, False), (2.0, True)):
        points = [each.model_copy(update={"drop_error": error}) if each == best else each for each in made.points]
        front = made.model_copy(update={"points": points, "limits": {**made.limits, "max_drop": 1.0}})
        assert (
            any("larger than the allowed drop. Use more validation" in line for line in verdict_lines(front)) == warns
        )
        halved = verdict_lines(front.model_copy(update={"tests_chose": True}))
        assert any("larger than the allowed drop. Use more test images" in line for line in halved) == warns


def test_a_point_can_be_chosen_by_name(tmp_path, monkeypatch, capfd):
    made = front_of(3)
    (tmp_path / "front.json").write_text(made.model_dump_json())
    result = Result(tmp_path, made)
    assert result.pick(point="best").point.name == "best"
    assert result.pick(point="original-onnxruntime").file == tmp_path / "points/original-onnxruntime/model.onnx"
    dominated = made.dominated[0]
    choice = result.pick(point=dominated.name)
    assert choice.point == dominated
    assert choice.shortfall.startswith("it takes")
    with pytest.raises(InputError, match="Give either the name of a point or limits"):
        result.pick(point="best", max_drop=1)
    shown = printed(["pick", tmp_path, "--point", dominated.name], monkeypatch, capfd)
    assert f"│ * {dominated.name} " in shown
    assert f"{dominated.name} does not meet the budget: it takes" in shown
    assert f"chosen: {dominated.name}\n" in shown


def test_the_error_for_a_wrong_point_name_lists_the_valid_names(tmp_path, monkeypatch, capfd):
    made = front_of(3)
    (tmp_path / "front.json").write_text(made.model_dump_json())
    names = dict.fromkeys(point.name for point in (*made.points, *made.baselines))
    dominated = len(made.dominated)
    assert dominated
    message = (
        f"{tmp_path} has no point 'orignal-8bit'. Did you mean original-8bit? Points of the Pareto front, and "
        f"baselines that need no search: {', '.join(names)}. report.html has {dominated} more."
    )
    with pytest.raises(InputError) as refused:
        Result(tmp_path, made).pick(point="orignal-8bit")
    assert str(refused.value) == message
    monkeypatch.setattr(sys, "argv", ["tersor", "pick", str(tmp_path), "--point", "orignal-8bit"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err
    hidden = made.dominated[0].name
    with pytest.raises(InputError, match=f"Did you mean {hidden}"):
        Result(tmp_path, made).pick(point=f"{hidden}x")
    with pytest.raises(InputError, match=r"has no point 'zzz'\. Points of the Pareto front"):
        Result(tmp_path, made).pick(point="zzz")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency": {1: 2.0}}, "unknown limit 'latency'. Did you mean 'latency_ms'? Possible: latency_ms, max_drop,"),
        ({"minutes": 5}, "unknown limit 'minutes'. Possible: latency_ms, max_drop, megabytes."),
        ({"point": "best", "drop": 1}, "unknown limit 'drop'. Did you mean 'max_drop'?"),
        ({"budget": 0.5}, "budget is of type float. Pass tersor.Budget(max_drop=0.5), or max_drop=0.5."),
        ({"budget": Budget(), "max_drop": 1}, "a budget and max_drop are given. Give either a budget or limits."),
        ({"budget": Budget(), "point": "best"}, "Give either the name of a point or limits."),
    ],
)
def test_wrong_arguments_of_pick_raise_one_error(tmp_path, given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Result(tmp_path, front_of(3)).pick(**given)


def test_a_point_that_is_equal_to_one_of_the_front_but_meets_the_budget_is_picked(tmp_path):
    made = front_of(3)
    slower, faster = point("slower", 93.4, 1.0), point("faster", 93.3, 0.99)
    error = dict.fromkeys(SIZES, 0.02)
    slower, faster = (each.model_copy(update={"latency_error": error, "bytes": 10**5}) for each in (slower, faster))
    kept = front([slower, faster])
    assert kept == [slower]
    result = Result(tmp_path, made.model_copy(update={"points": kept, "dominated": [faster]}))
    assert result.pick(latency_ms={1: 1.005}).point == slower
    choice = result.pick(latency_ms={1: 0.995})
    assert (choice.point, choice.shortfall) == (faster, "")
    assert result.pick(latency_ms={1: 0.001}).point == slower


@pytest.fixture
def searched(tmp_path):
    """The folder of a search whose best point has 0.6 ms at batch 1."""
    made, folder = front_of(3), tmp_path / "search"
    for each in made.points:
        file = folder / each.file
        file.parent.mkdir(parents=True, exist_ok=True)
        export(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2), file)
    (folder / "front.json").write_text(made.model_dump_json())
    return folder


def test_the_json_output_states_whether_the_budget_is_met(searched, tmp_path, monkeypatch, capfd):
    out = tmp_path / "p.onnx"
    for limits, met in ((["--latency", "1:0.001ms", "--out", out], False), (["--max-drop", 100], True)):
        monkeypatch.setattr(sys, "argv", ["tersor", "pick", str(searched), *map(str, limits), "--json"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        output = capfd.readouterr()
        document = json.loads(output.out)
        assert set(document) == set(schema_of("pick")["properties"])
        assert (document["met"], document["shortfall"] == "") == (met, met)
        assert document["file"] == str(searched / document["point"]["file"] if met else out)
        assert f"chosen: {document['point']['name']}" in output.err
        (line,) = [each for each in output.err.splitlines() if each.startswith(("written: ", "file: "))]
        assert (f"exceeds the budget: {document['shortfall']}" in line) == (not met)
    assert document["budget"] == "at most 100 points lost"


def test_an_existing_output_file_is_accepted_only_if_its_content_is_the_same(searched, tmp_path, monkeypatch, capfd):
    out = tmp_path / "p.onnx"
    for _ in range(2):
        assert f"written: {out}" in printed(["pick", searched, "--out", out], monkeypatch, capfd)
    own = searched / front_of(3).point("best").file
    printed(["pick", searched, "--point", "best", "--out", own], monkeypatch, capfd)
    out.write_bytes(b"mine")
    monkeypatch.setattr(sys, "argv", ["tersor", "pick", str(searched), "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    output = capfd.readouterr()
    assert (
        output.err == f"error: {out} already exists and will not be overwritten. Choose another file, or remove it.\n"
    )
    assert (output.out, out.read_bytes()) == ("", b"mine")


def test_a_front_with_a_single_point_is_explained(tmp_path, monkeypatch, capfd):
    made = front_of(3)
    one = made.model_copy(update={"points": made.points[:1], "dominated": made.points[1:], "best": made.points[0].name})
    sentence = f"The Pareto front has one point: of all networks measured in OpenVINO, {one.best} has the best accuracy"
    assert not any("has one point" in line for line in verdict_lines(made))
    assert sum(line.startswith(sentence) for line in verdict_lines(one)) == 1
    (tmp_path / "front.json").write_text(one.model_dump_json())
    assert sentence in printed(["pick", tmp_path], monkeypatch, capfd)


def printed(arguments, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["tersor", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    return capfd.readouterr().out


def test_the_printed_front_contains_the_error_of_each_latency():
    made = front_of(0)
    best = made.points[0].model_copy(update={"latency_error": {1: 0.03, 128: 0.02}})
    console = Console(width=80, record=True, file=io.StringIO())
    show(console, *front_tables(made.model_copy(update={"points": [best]})))
    text = console.export_text()
    row = next(line for line in text.splitlines() if "* best" in line)
    below = text.splitlines()[text.splitlines().index(row) + 1]
    assert [cell.strip() for cell in row.split("│")[4:6]] == ["0.600", "47.3"]
    assert [cell.strip() for cell in below.split("│")[4:6]] == ["± 0.018", "± 1.0"]
    assert "± is half the width of the 95 % interval. Latencies and intervals are computed from" in " ".join(
        text.split()
    )


def test_names_in_the_printed_front_are_wrapped_after_hyphens():
    front = front_of(0)
    long = "original-branches3-8bit-217steps-of-10000"
    best = point(long, 93.0, 0.5)
    console = Console(width=70, record=True, file=io.StringIO())
    show(console, *front_tables(front.model_copy(update={"points": [*front.points, best], "best": long})))
    cells = [line.split("\u2502")[1].strip() for line in console.export_text().splitlines() if "\u2502" in line]
    first = cells.index("* original-branches3-")
    assert cells[first : first + 3] == ["* original-branches3-", "8bit-217steps-of-10000", "openvino int8"]
    wide = Console(width=140, record=True, file=io.StringIO())
    show(wide, *front_tables(front.model_copy(update={"points": [best], "best": long})))
    assert f"* {long} " in wide.export_text()


@pytest.mark.parametrize("sizes", [(1, 128), (1, 32, 128), (1, 2, 4, 8, 16, 32, 64, 128)])
def test_all_columns_of_the_printed_front_fit_80_columns(sizes):
    front = front_of(0)
    best = point("original-branches3-8bit-217steps", 93.0, 0.5, latency_ms={size: size / 7 for size in sizes})
    console = Console(width=80, record=True, file=io.StringIO())
    show(console, *front_tables(front.model_copy(update={"points": [best], "baselines": [], "best": best.name})))
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= 80 and (line[:1] not in "│┃" or line.rstrip()[-1] in "│┃") for line in lines)
    printed = "\n".join(lines)
    for text in (*(f"batch {size} " for size in sizes), *(f" {size / 7:.3g} " for size in sizes), "93.00", " MB "):
        assert printed.count(text) == 1, text


def test_a_file_is_exported_completely_or_not_at_all(tmp_path, monkeypatch):
    file, out = tmp_path / "model.onnx", tmp_path / "copy.onnx"
    choice = Choice(front_of(1).points[0], file, "")
    with pytest.raises(InputError, match="is missing from the folder of the search"):
        choice.export(out)
    file.write_bytes(b"network")

    def full(_source, target):
        Path(target).write_bytes(b"net")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(InputError, match=r"cannot write .*copy\.onnx: No space left"):
            choice.export(out)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert choice.export(out).read_bytes() == b"network"
