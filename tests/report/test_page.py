from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from samples import alone, evidence_of, numbers_of, positions_of, ratio_of, with_errors, without_latency

from browser import CHROMIUM, chromium
from tersor import cli
from tersor.checkpoint.artifact import read_artifact, write_folder
from tersor.core.errors import InputError
from tersor.report.page import write_report

SCRIPT = "</script><script>alert(1)</script>"


class Elements(HTMLParser):
    """Elements with their attributes; asserts that elements are closed in order."""

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


def test_medians_whose_ratio_differs_from_the_speedup_are_explained(page):
    numbers = numbers_of()
    assert "parentheses.</p>" in page(numbers)
    numbers["speedup"]["original"]["1"] = ratio_of(3.0)
    sentence = "The median latencies give a ratio of 4.0x (the original, batch 1). It is outside the"
    assert f"parentheses. {sentence}" in page(numbers)


def test_the_verdict_is_the_heading(page):
    text = page()
    assert re.findall(r"<h1>(.*?)</h1>", text) == [
        (
            "4.0x faster (3.8 to 4.2) than the original and 2.0x faster (1.9 to 2.1) than the baseline at batch 1, "
            "4.0x smaller, accuracy 0.4 points lower."
        )
    ]
    assert "<title>tersor: 4.0x faster" in text
    assert (
        "Original: original.onnx, ONNX Runtime in float32. Baseline: original.onnx in the fastest of "
        "ONNX Runtime and OpenVINO at their default precision: OpenVINO in bfloat16."
    ) in text


def test_the_baseline_of_each_batch_size_is_named(page):
    numbers = numbers_of()
    numbers["baseline"]["32"] = {"runtime": "onnxruntime", "precision": "float32"}
    assert "OpenVINO in bfloat16 at batch 1, ONNX Runtime in float32 at batch 32." in page(numbers)
    one, many = (
        re.search(rf'<th scope="row">latency at batch {size}, ms</th>(.*?)</tr>', page())[1] for size in (1, 32)
    )
    assert re.findall("<td>([^<]*)<small>baseline", one) == ["2.00"]
    assert re.findall("<td>([^<]*)<small>baseline", many) == ["4.00"]


def test_latency_ratios_have_confidence_intervals(page):
    row = re.search(r'<th scope="row">latency at batch 1, ms</th>(.*?)</tr>', page())[1]
    assert '<span class="against-original">4.0x faster (3.8 to 4.2)</span>' in row
    assert '<span class="against-baseline">2.0x faster (1.9 to 2.1)</span>' in row


def test_the_reason_for_stopping_is_shown(page):
    text = page()
    assert (
        "5 rounds in 2 groups; new sessions were opened for each group. The measurement stopped when every confidence "
        "interval was narrower than 10 %."
    ) in text
    assert (
        "The measurement stopped at the time limit of 10 s, before every confidence interval was narrower than 10 %."
        in text
    )


def test_the_share_of_the_peak_throughput_is_shown_if_it_was_measured(page):
    assert "peak throughput" not in page(), "not measured"
    rates = {("onnxruntime", "float32"): 1e10, ("onnxruntime", "int8"): 4e10, ("openvino", "bfloat16"): 2e10}
    numbers = numbers_of(
        peaks=[
            {"runtime": runtime, "precision": precision, "macs_per_second": rate, "median": 0.8 * rate, "n": 20}
            for (runtime, precision), rate in rates.items()
        ]
    )
    numbers["artifact"]["integer_macs_share"] = 1.0
    text = page(numbers)
    section = text.partition("<h2>Share of the peak throughput</h2>")[2].partition("</section>")[0]
    rows = [re.findall("<td>([0-9.–]+)</td>", row) for row in re.findall('scope="row">.*?</tr>', section)]
    assert rows[0] == ["2.50", "25", "80.0", "800"], "1e7 MACs in 4 ms; at batch 32 in 4 ms"
    assert rows[1] == ["5.00", "25", "160", "800"], "bfloat16"
    assert rows[2] == ["5.00", "12", "160", "400"], "5e6 MACs in 1 ms at 4e10"
    assert "at least 80 % of the peak" in section
    assert "A share above 100 % has one of two causes." in section
    for peak in numbers["peaks"]:
        peak["macs_per_second"] *= 100
    assert "above 100 %" not in page(numbers), "the largest share is 8 %"


def test_the_precision_is_read_from_the_numbers(page):
    numbers = numbers_of()
    numbers["artifact"]["precision"] = "int8, rest float32"
    cells = re.search(r'<th scope="row">precision</th>(.*?)</tr>', page(numbers), re.DOTALL)[1]
    assert re.findall("<td>([^<]+)</td>", cells)[::2] == ["float32", "int8, rest float32"]


def test_the_page_warns_about_a_file_that_disagrees_with_torch(page):
    numbers = numbers_of(agreement_with_torch=97.5)
    warning = "Warning: only 97.50 % of the predictions of model.onnx agree with those of the network in torch."
    assert warning in page(numbers)
    assert "agree with those" not in page(numbers | {"agreement_with_torch": 99.0})


def test_the_page_warns_about_a_quantization_that_made_the_file_slower(page):
    numbers = numbers_of()
    ratios = {"1": ratio_of(0.8), "32": ratio_of(1.0), "128": ratio_of(0.5)}
    numbers["stages"][-1]["speedup_of_quantization"] = ratios
    warning = (
        "Warning: stage quantize: the quantized file is 1.2x slower (1.2 to 1.3) at batch 1 and "
        "2.0x slower (1.9 to 2.1) at batch 128 than the file before this stage."
    )
    assert warning in page(numbers)
    numbers["stages"][-1]["speedup_of_quantization"] = {"1": ratio_of(1.5)}
    assert "Warning" not in page(numbers)


def test_the_page_has_all_sections(page):
    text = page()
    for title in ("Results", "Results by stage", "Latency measurements", "Time per operator and layer", "Layers",
                  "Weight distributions", "Soft targets", "Class similarity", "Attention maps", "Changed predictions",
                  "Weights moved toward the quantization grid", "Feature reconstruction"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert "Some CPU" in text
    assert "2 threads" in text
    assert text.count("<circle") == 2 * 3 * 5, "every run of three entries at two batch sizes"
    assert "soft_targets (temperature 4)" in text
    assert "out 2/4, in 3/3" in text
    assert "0.50 bits" in text
    assert "T = 16" in text


def test_the_page_is_well_formed_and_loads_nothing(page):
    text = page()
    elements = Elements(text).elements
    names = {name for name, _ in elements}
    assert not names & {"script", "iframe", "object", "embed", "form"}
    policy = next(attributes["content"] for _, attributes in elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    for name, attributes in elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], name
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:"), name
    assert "http://" not in text
    assert "https://" not in text


def test_images_and_drawings_have_alternative_texts(page):
    for name, attributes in Elements(page()).elements:
        assert name != "img" or attributes["alt"]
        assert name != "svg" or attributes["aria-label"]


def test_untrusted_names_are_escaped(page):
    numbers, evidence = numbers_of(classes=[SCRIPT, f'"{SCRIPT}']), evidence_of()
    numbers["stages"][0]["name"] = numbers["machine"]["cpu"] = SCRIPT
    evidence["layers"][0]["name"] = evidence["profile"]["1"]["artifact"]["kinds"][0]["kind"] = SCRIPT
    evidence["masks"][0]["name"] = evidence["widths"][0]["name"] = numbers["stages"][2]["name"] = SCRIPT
    text = page(numbers, evidence)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 5
    Elements(text)


def test_float_operators_have_a_table_and_a_warning(page):
    assert "<h3>Operators in float</h3>" not in page()
    numbers = numbers_of()
    operator = {"name": "rnn", "kind": "LSTM", "reason": f"recurrent {SCRIPT}", "macs": 1_310_720, "share": 0.763}
    numbers["artifact"] |= {
        "integer_macs_share": 0.237,
        "float_operators": [operator, {**operator, "name": "", "kind": "matmul", "share": 0.0001}],
        "uncounted_operators": ["aten._fft_r2c in 2", SCRIPT],
    }
    text = page(numbers)
    assert "<h3>Operators in float</h3>" in text
    assert "Warning: only 23.7 % of the MACs are computed in integers." in text
    cells = re.findall(r'<th scope="row">rnn</th>(.*?)</tr>', text)
    reason = "recurrent &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;"
    assert cells == [f"<td>LSTM</td><td>1.31</td><td>76.3 %</td><td>{reason}</td>"]
    assert "&lt;0.1 %" in text
    assert "Not included in any MAC count: aten._fft_r2c in 2" in text
    assert "<script" not in text
    numbers["artifact"]["integer_macs_share"] = 0.97
    assert "<p>97.0 % of the MACs are computed in integers." in page(numbers)


def test_missing_evidence_is_mentioned_on_the_page(folder, page):
    (folder / "evidence.json").unlink()
    text = page()
    assert "There is no evidence.json" in text
    assert "<h2>Layers</h2>" not in text
    assert "<h2>Latency measurements</h2>" in text


def test_no_selector_if_the_original_is_the_baseline(page):
    text = page(alone(1.0))
    assert "<fieldset" not in text
    assert '"against-baseline"' not in text
    assert "original.onnx in ONNX Runtime at its default precision: ONNX Runtime in float32." in text
    assert text.count("<circle") == 2 * 2 * 5, "the original once"


def test_a_stage_shows_only_its_known_values(page):
    rows = re.findall(r"<tr>(.*?)</tr>", page())
    distil, quantize = (next(row for row in rows if f'scope="row">{name}<' in row) for name in ("distil", "quantize"))
    assert "90.20<small>+0.20 points</small>" in distil
    assert "3.500<small>1.1x faster (1.1 to 1.2)</small>" in distil
    assert "100 steps, 3.0 min" in distil
    assert quantize.count("<td>–<small></small></td>") == 5


def test_a_reconstruction_is_shown_if_there_is_one(page):
    text = page()
    assert "after the last epoch: 40.0 %" in text
    assert text.count('class="heatmap"') == 12
    numbers = numbers_of()
    del numbers["stages"][0]["reconstruction"]
    assert "Feature reconstruction" not in page(numbers)


def test_weights_moved_toward_a_grid_are_shown_if_there_are_any(page):
    text = page()
    assert "Stage draw, psgd" in text
    assert text.count("mean distance: 0.250 before the stage, 0.125 after it") == 6, "of all and of a layer"
    assert "weights far from a point moved far, and weights on a point stayed." in text
    assert "initial distance 0.25 to 0.30 steps; mean movement: 0.125" in text
    assert "initial distance to the nearest point, both in steps." in text
    assert "conv, 3 bits" in text
    numbers = numbers_of()
    numbers["stages"][1]["drawn"] = positions_of(target="zero", scale_by="constant")
    text = page(numbers)
    assert "<h2>Weights moved toward zero</h2>" in text
    assert "mean movement by initial distance from zero, both divided by twice the largest weight of the layer." in text
    assert "initial distance 0.25 to 0.30; mean movement: 0.125" in text
    assert "This is the control" in text
    assert "conv, 3 bits" not in text
    del numbers["stages"][1]["drawn"]
    assert "Weights moved" not in page(numbers)


def test_levels_and_bit_operations_are_grouped_by_bits(folder, page):
    evidence = evidence_of()
    evidence["layers"][0]["macs"] = 3_000_000
    (folder / "evidence.json").write_text(
        json.dumps(evidence | {"layers": [*evidence["layers"][:1] * 2, evidence["layers"][1]]})
    )
    text = page()
    assert "10.2 billion bit operations in the original, 0.320 billion in the artifact" in text, (
        "1e7 macs at 32 x 32, 5e6 at 8 x 8"
    )
    row = re.search(r'<th scope="row">2 / 8</th>(.*?)</tr>', text)[1]
    assert re.findall("<td>(.*?)</td>", row) == ["2", "12", "2<sup>2</sup> = 4", "3", "0.0960", "6.14"]
    row = re.search(r'<th scope="row">32 / 32</th>(.*?)</tr>', text)[1]
    assert "<td>2<sup>32</sup></td><td>–</td>" in row


def test_output_errors_are_shown_if_a_layer_is_quantized(page):
    assert "<title>conv: 20.0</title>" in page()
    evidence = evidence_of()
    for layer in evidence["layers"]:
        layer["error"] = None
    assert "Output error of each layer" not in page(evidence=evidence)


def test_the_page_is_deterministic(page):
    assert page() == page()


def test_many_classes_are_reduced_to_those_with_the_largest_drops_and_gains(page):
    evidence = evidence_of()
    evidence["predictions"]["classes"] = [
        {"class": number, "images": 50, "before": 25, "after": number // 4} for number in range(200)
    ]
    evidence["predictions"]["changes"] = [[number, number + 1, 5] for number in range(60)]
    text = page(evidence=evidence)
    assert "The first 10 and the last 10 of 200 classes" in text
    assert 'scope="row">class 199<' in text
    assert 'scope="row">class 100<' not in text
    assert "The most frequent changes" in text


def test_no_matrix_without_changed_predictions(page):
    evidence = evidence_of()
    evidence["predictions"] |= {"changes": [], "examples": [], "lost": 0, "gained": 0}
    assert "Changes by class" not in page(evidence=evidence)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ('{"runtime": "onnxruntime"}', "was not written by this version of tersor")],
)
def test_damaged_numbers_do_not_change_the_page(folder, text, message):
    before = write_report(folder).read_text(encoding="utf-8")
    (folder / "numbers.json").write_text(text)
    with pytest.raises(InputError, match=message):
        write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in folder.iterdir()) == ["evidence.json", "numbers.json", "report.html"]


def test_a_failed_write_does_not_change_the_page(folder, monkeypatch):
    before = write_report(folder).read_text(encoding="utf-8")
    (folder / "evidence.json").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in folder.iterdir()) == ["numbers.json", "report.html"]


def test_a_folder_without_numbers_raises(tmp_path):
    with pytest.raises(InputError, match=r"has no numbers\.json"):
        write_report(tmp_path)


def test_the_report_command_writes_the_page_again(folder, tmp_path_factory, monkeypatch, capfd):
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
def test_the_page_in_chromium_fits_and_switches_the_reference(folder):
    evidence = evidence_of()
    evidence["layers"][0]["name"] = "a_very_long_name." * 8
    (folder / "evidence.json").write_text(json.dumps(evidence))
    path = write_report(folder)
    with chromium() as browser:
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                browser.open(path, width, scheme)
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
        assert {url for url in browser.requests if not url.startswith("data:")} == {path.as_uri()}


def test_without_latency_the_page_claims_no_speedup(page):
    text = page(without_latency(), evidence_of(profile={}))
    assert "<h1>4.0x smaller, accuracy 0.4 points lower. Latency was not measured.</h1>" in text
    assert "Latency was not measured, so no speedup is shown. To measure it, run <code>tersor bench</code> on" in text
    assert "Baseline:" not in text
    for claim in ("x faster", "x slower", "latency at batch"):
        assert claim not in text
    for title in ("Latency measurements", "Time per operator and layer"):
        assert f"<h2>{title}</h2>" not in text
    for title in ("Results", "Results by stage", "Layers"):
        assert f"<h2>{title}</h2>" in text


def test_accuracies_are_shown_with_their_standard_errors(page):
    text = page(with_errors())
    row = re.search(r'<th scope="row">accuracy, %</th>(.*?)</tr>', text)[1]
    assert re.findall("<td>([0-9][^<]*)</td>", row) == ["90.00 ± 0.95", "89.90 ± 0.95", "89.60 ± 0.95"]
    assert '<span class="against-original">−0.40 ± 0.35 points</span>' in row
    assert '<span class="against-baseline">−0.30 points</span>' in row, "that error is not known"
    assert (
        "± is one standard error on 1,000 test images. The difference from the original (−0.40 ± 0.35 points, from the "
        "same images) is less than two standard errors, so it may be chance."
    ) in text
    assert "± is" not in page(numbers_of())
