from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium
from samples import alone, drawn_of, evidence_of, numbers_of

from tersor import cli
from tersor.checkpoint.artifact import read_artifact, write_folder
from tersor.core.errors import InputError
from tersor.report.page import draw

SCRIPT = "</script><script>alert(1)</script>"


class Page(HTMLParser):
    """Elements with their attributes, and whether every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "input", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def drawn(folder) -> str:
    return draw(folder).read_text(encoding="utf-8")


def test_the_first_line_is_the_verdict_against_both(folder):
    text = drawn(folder)
    assert re.findall(r"<h1>(.*?)</h1>", text) == [
        (
            "4.0x faster (3.8 to 4.2) than the original and 2.0x faster (1.9 to 2.1) than the baseline at batch 1, "
            "4.0x smaller, 0.4 points lost."
        )
    ]
    assert "<title>tersor: 4.0x faster" in text
    assert (
        "Original: original.onnx, ONNX Runtime in float32. Baseline: the same file where it is fastest without any "
        "change, of ONNX Runtime and OpenVINO at their default precision: OpenVINO in bfloat16."
    ) in text


def test_a_baseline_for_each_batch_size_is_named(folder):
    numbers = numbers_of()
    numbers["baseline"]["32"] = {"runtime": "onnxruntime", "precision": "float32"}
    (folder / "numbers.json").write_text(json.dumps(numbers))
    assert "OpenVINO in bfloat16 at batch 1, ONNX Runtime in float32 at batch 32." in drawn(folder)
    one, many = (re.search(rf'<th scope="row">ms, batch {size}</th>(.*?)</tr>', drawn(folder))[1] for size in (1, 32))
    assert re.findall("<td>([^<]*)<small>baseline", one) == ["2.00"]
    assert re.findall("<td>([^<]*)<small>baseline", many) == ["4.00"]


def test_ratios_of_latency_have_intervals(folder):
    row = re.search(r'<th scope="row">ms, batch 1</th>(.*?)</tr>', drawn(folder))[1]
    assert '<span class="against-original">4.0x faster (3.8 to 4.2)</span>' in row
    assert '<span class="against-baseline">2.0x faster (1.9 to 2.1)</span>' in row


def test_what_ended_the_rounds_is_told(folder):
    text = drawn(folder)
    assert (
        "5 rounds in 2 groups; every group opened all files again. They ended when every interval was narrower than "
        "10 %."
    ) in text
    assert "They ended at the time limit of 10 s, before every interval was narrower than 10 %." in text


def test_the_page_holds_what_was_asked(folder):
    text = drawn(folder)
    for title in ("In figures", "What each stage gave and cost", "Latency, round by round", "Where the time goes",
                  "Layer by layer", "Weights on their grid", "Softened targets", "What it finds alike",
                  "Where they look", "Answers that changed", "Weights drawn to their grid",
                  "What comes back of a feature"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert "Some CPU" in text
    assert "2 threads" in text
    assert text.count("<circle") == 2 * 3 * 5, "every run of three contenders at two batch sizes"
    assert "soft_targets (temperature 4)" in text
    assert "out 2/4, in 3/3" in text
    assert "0.50 bits" in text
    assert "T = 16" in text


def test_the_page_is_well_formed_and_loads_nothing(folder):
    page = Page(drawn(folder))
    names = {name for name, _ in page.elements}
    assert not names & {"script", "iframe", "object", "embed", "form"}
    policy = next(found["content"] for _, found in page.elements if "http-equiv" in found)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    for name, found in page.elements:
        assert not [key for key in found if key.startswith("on") or key == "style"], name
        for key in ("src", "href"):
            assert found.get(key, "data:").startswith("data:"), name
    assert "http://" not in drawn(folder)
    assert "https://" not in drawn(folder)


def test_images_and_drawings_have_names(folder):
    for name, found in Page(drawn(folder)).elements:
        assert name != "img" or found["alt"]
        assert name != "svg" or found["aria-label"]


def test_untrusted_names_are_text(folder):
    numbers, evidence = numbers_of(classes=[SCRIPT, f'"{SCRIPT}']), evidence_of()
    numbers["stages"][0]["name"] = numbers["machine"]["cpu"] = SCRIPT
    evidence["layers"][0]["name"] = evidence["profile"]["1"]["artifact"]["kinds"][0]["kind"] = SCRIPT
    evidence["masks"][0]["name"] = evidence["widths"][0]["name"] = numbers["stages"][2]["name"] = SCRIPT
    (folder / "numbers.json").write_text(json.dumps(numbers))
    (folder / "evidence.json").write_text(json.dumps(evidence))
    text = drawn(folder)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 5
    Page(text)


def test_what_stays_in_float_is_a_table_and_a_warning(folder):
    assert "<h3>In float</h3>" not in drawn(folder)
    numbers = numbers_of()
    operator = {"name": "rnn", "kind": "LSTM", "reason": f"recurrent {SCRIPT}", "macs": 1_310_720, "share": 0.763}
    numbers["artifact"] |= {
        "integer_macs_share": 0.237,
        "float_operators": [operator, {**operator, "name": "", "kind": "matmul", "share": 0.0001}],
        "uncounted_operators": ["aten._fft_r2c in 2", SCRIPT],
    }
    (folder / "numbers.json").write_text(json.dumps(numbers))
    text = drawn(folder)
    assert "<h3>In float</h3>" in text
    assert "Warning: only 23.7 % of the MACs are in integers." in text
    cells = re.findall(r'<th scope="row">rnn</th>(.*?)</tr>', text)
    reason = "recurrent &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;"
    assert cells == [f"<td>LSTM</td><td>1.31</td><td>76.3 %</td><td>{reason}</td>"]
    assert "&lt;0.1 %" in text
    assert "In no count of multiplications: aten._fft_r2c in 2" in text
    assert "<script" not in text
    numbers["artifact"]["integer_macs_share"] = 0.97
    (folder / "numbers.json").write_text(json.dumps(numbers))
    assert "<p>97.0 % of the MACs are in integers." in drawn(folder)


def test_without_evidence_the_page_says_so(folder):
    (folder / "evidence.json").unlink()
    text = drawn(folder)
    assert "There is no evidence.json" in text
    assert "Layer by layer" not in text
    assert "<h2>Latency, round by round</h2>" in text


def test_where_the_original_is_the_baseline_there_is_nothing_to_pick(folder):
    (folder / "numbers.json").write_text(json.dumps(alone(1.0)))
    text = drawn(folder)
    assert "<fieldset" not in text
    assert '"against-baseline"' not in text
    assert "without any change, of ONNX Runtime at its default precision: ONNX Runtime in float32." in text
    assert text.count("<circle") == 2 * 2 * 5, "the original once"


def test_a_stage_shows_what_is_known_of_it(folder):
    rows = re.findall(r"<tr>(.*?)</tr>", drawn(folder))
    distil, quantize = (next(row for row in rows if f'scope="row">{name}<' in row) for name in ("distil", "quantize"))
    assert "90.20<small>+0.20 points</small>" in distil
    assert "3.500<small>1.1x faster (1.1 to 1.2)</small>" in distil
    assert "100 steps, 3.0 min" in distil
    assert quantize.count("<td>–<small></small></td>") == 5


def test_a_reconstruction_is_shown_where_a_stage_told_of_one(folder):
    text = drawn(folder)
    assert "at last: 40.0 %" in text
    assert text.count('class="heatmap"') == 12
    numbers = numbers_of()
    del numbers["stages"][0]["reconstruction"]
    (folder / "numbers.json").write_text(json.dumps(numbers))
    assert "What comes back" not in drawn(folder)


def test_weights_that_were_drawn_are_shown_where_a_stage_told_of_them(folder):
    text = drawn(folder)
    assert "Stage draw, psgd" in text
    assert text.count("mean distance 0.250 steps before, 0.125 after") == 6, "of all and of a layer"
    assert "what is far moves much" in text
    assert "0.25 to 0.30 steps away: moved: artifact 0.125" in text
    assert "conv, 3 bits" in text
    numbers = numbers_of()
    numbers["stages"][1]["drawn"] = drawn_of(target="zero", scale_by="constant")
    (folder / "numbers.json").write_text(json.dumps(numbers))
    text = drawn(folder)
    assert "<h2>Weights drawn to zero</h2>" in text
    assert "This is the control" in text
    assert "conv, 3 bits" not in text
    del numbers["stages"][1]["drawn"]
    (folder / "numbers.json").write_text(json.dumps(numbers))
    assert "Weights drawn" not in drawn(folder)


def test_levels_and_bit_operations_of_layers_with_the_same_bits(folder):
    evidence = evidence_of()
    evidence["layers"][0]["macs"] = 3_000_000
    (folder / "evidence.json").write_text(
        json.dumps(evidence | {"layers": [*evidence["layers"][:1] * 2, evidence["layers"][1]]})
    )
    text = drawn(folder)
    assert "10.2 giga in the original, 0.320 in the artifact" in text, "1e7 macs at 32 x 32, 5e6 at 8 x 8"
    row = re.search(r'<th scope="row">2 / 8</th>(.*?)</tr>', text)[1]
    assert re.findall("<td>(.*?)</td>", row) == ["2", "12", "2<sup>2</sup> = 4", "3", "0.0960", "6.14"]
    row = re.search(r'<th scope="row">32 / 32</th>(.*?)</tr>', text)[1]
    assert "<td>2<sup>32</sup></td><td>–</td>" in row


def test_the_error_of_each_layer_is_drawn_where_something_is_rounded(folder):
    assert "<title>conv: artifact 20.0</title>" in drawn(folder)
    evidence = evidence_of()
    for layer in evidence["layers"]:
        layer["error"] = None
    (folder / "evidence.json").write_text(json.dumps(evidence))
    assert "Error of each layer" not in drawn(folder)


def test_the_same_evidence_gives_the_same_page(folder):
    assert drawn(folder) == drawn(folder)


def test_many_classes_are_cut_to_those_that_changed_most(folder):
    evidence = evidence_of()
    evidence["answers"]["classes"] = [
        {"class": number, "images": 50, "before": 25, "after": number // 4} for number in range(200)
    ]
    evidence["answers"]["moves"] = [[number, number + 1, 5] for number in range(60)]
    (folder / "evidence.json").write_text(json.dumps(evidence))
    text = drawn(folder)
    assert "The 20 classes that changed most" in text
    assert 'scope="row">class 199<' in text
    assert 'scope="row">class 100<' not in text
    assert "The most frequent changes" in text


def test_where_no_answer_changed_there_is_no_matrix(folder):
    evidence = evidence_of()
    evidence["answers"] |= {"moves": [], "shown": [], "lost": 0, "gained": 0}
    (folder / "evidence.json").write_text(json.dumps(evidence))
    assert "From which answer" not in drawn(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ('{"runtime": "onnxruntime"}', "is not what this version of tersor writes")],
)
def test_damaged_numbers_leave_the_page_as_it_was(folder, text, message):
    before = drawn(folder)
    (folder / "numbers.json").write_text(text)
    with pytest.raises(InputError, match=message):
        draw(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in folder.iterdir()) == ["evidence.json", "numbers.json", "report.html"]


def test_a_page_that_cannot_be_written_leaves_the_one_before(folder, monkeypatch):
    before = drawn(folder)
    (folder / "evidence.json").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        draw(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in folder.iterdir()) == ["numbers.json", "report.html"]


def test_a_folder_without_numbers_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no numbers\.json"):
        draw(tmp_path)


def test_the_command_draws_the_page_again(folder, tmp_path_factory, monkeypatch, capfd):
    def command(path: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["tersor", "report", str(path)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    assert command(folder) == 2, "no manifest: no artifact"
    assert not (folder / "report.html").exists()
    (folder / "model.onnx").write_bytes(b"network")
    out = write_folder(
        tmp_path_factory.mktemp("runs") / "out", lambda new: shutil.copytree(folder, new, dirs_exist_ok=True)
    )
    assert command(out) == 0
    assert "report.html" in capfd.readouterr().out
    assert command(out) == 0
    assert "report.html" in read_artifact(out).files
    (out / "numbers.json").write_text("{}")
    assert command(out) == 2
    assert "numbers.json has 2 bytes" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_in_chromium(folder):
    evidence = evidence_of()
    evidence["layers"][0]["name"] = "a_very_long_name." * 8
    (folder / "evidence.json").write_text(json.dumps(evidence))
    page = draw(folder)
    with chromium() as browser:
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                browser.open(page, width, scheme)
                assert browser.value("document.scrollingElement.scrollWidth") <= width, (width, scheme)
                assert browser.value("document.images.length") == 6
                assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
        shown = "getComputedStyle(document.querySelector('span.against-{}')).display"
        assert browser.value(shown.format("original")) != "none"
        browser.press("Tab", 9)
        assert browser.value("document.activeElement.id") == "pick-original"
        browser.press("ArrowRight", 39)
        assert browser.value(shown.format("original")) == "none"
        assert browser.value(shown.format("baseline")) != "none"
        assert browser.complaints == []
        assert {url for url in browser.requests if not url.startswith("data:")} == {page.as_uri()}
