"""The page of a search: size, security policy, and its controls in Chromium."""

import json
import re

import pytest
from front_samples import evidence_for, front_of, write

from browser import CHROMIUM, chromium
from tersor import cli
from tersor.search.front_page import charts, write_front_page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("search"), front_of()
    write(folder, made)
    return write_front_page(folder, made)


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="front-data">(.*?)</script>', text)[1])


def test_a_page_of_two_hundred_trials_has_less_than_three_megabytes(page):
    assert page.stat().st_size < 3e6
    data = data_of(page.read_text())
    assert len(data["points"]) == 203
    assert {each["family"] for each in data["points"]} > {"free baselines", "fewer branches", "student networks"}
    assert data["evidence"]["classes"] == evidence_for(front_of())["classes"]


def test_the_page_runs_only_its_own_script_and_loads_nothing(page):
    text = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy)
    assert "default-src 'none'" in policy
    assert text.count("<script") == 2, "data and script; names of classes are escaped"
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_the_share_of_the_peak_is_computed_from_rate_and_latency(page):
    points = {each["name"]: each for each in data_of(page.read_text())["points"]}
    assert points["original"]["peak"]["1"] == pytest.approx(100 * 2e8 / 2e-3 / 2e11), "bfloat16"
    assert points["original-8bit"]["peak"]["1"] == pytest.approx(100 * 1e8 / 1e-3 / 4e11), "int8"
    assert points["original-onnxruntime"]["peak"]["1"] is None, "not measured"


@pytest.mark.parametrize(("factor", "above"), [(1000, False), (0.1, True)])
def test_a_share_above_the_peak_is_explained(factor, above, tmp_path):
    made = front_of(3)
    write(tmp_path, made)
    evidence = json.loads((tmp_path / "evidence.json").read_text())
    for peak in evidence["peaks"]:
        peak["macs_per_second"] *= factor
    (tmp_path / "evidence.json").write_text(json.dumps(evidence))
    text = write_front_page(tmp_path, made).read_text()
    shares = [share for each in data_of(text)["points"] for share in each["peak"].values() if share is not None]
    assert (max(shares) > 100) is above
    assert ("A share above 100 % has one of two causes." in text) is above


def test_before_the_end_of_a_search_there_is_no_evidence(tmp_path):
    text = write_front_page(tmp_path, front_of(3)).read_text()
    assert data_of(text)["evidence"] == {}
    assert "peak throughput" not in text.partition("<script")[0].lower()


def test_positions_in_a_chart_are_computed_from_its_axes():
    made = front_of(30)
    made = made.model_copy(update={"limits": made.limits | {"megabytes": 0.01}})
    low = made.points[0].model_copy(update={"name": "low", "validation": 60.0})
    points = [*made.baselines, *made.points, low]
    drawn = {chart.title: chart for chart in charts(made, points)}
    values = {
        "ms at batch 1": lambda point: point.latency_ms[1],
        "ms at batch 128": lambda point: point.latency_ms[128],
        "MB": lambda point: point.bytes / 1e6,
        "million MACs": lambda point: point.macs / 1e6,
    }
    assert drawn.keys() == values.keys()
    for title, value in values.items():
        chart = drawn[title]
        limit = {"ms at batch 1": [0.9], "MB": [0.01]}.get(title, [])
        ends = [*map(value, points), *limit]
        assert (chart.low, chart.high) == pytest.approx((min(ends) / 1.08, max(ends) * 1.08))
        best = max(point.validation for point in points)
        assert (chart.bottom, chart.top) == pytest.approx((best - 12 * 1.08, best + 12 * 0.08))
        for point, dot in zip(points, chart.points, strict=True):
            assert chart.low * (chart.high / chart.low) ** dot["x"] == pytest.approx(value(point))
            shown = chart.bottom + dot["y"] * (chart.top - chart.bottom)
            assert shown == pytest.approx(max(point.validation, chart.bottom))
        assert chart.bottom + chart.floor * (chart.top - chart.bottom) == pytest.approx(94.0 - 1.0)
        assert (chart.limit is None) == (not limit)
        if limit:
            assert chart.low * (chart.high / chart.low) ** chart.limit == pytest.approx(limit[0])
    assert [dot["kind"] for dot in chart.points] == [
        "baseline" if point.free else "artifact" for point in points[:-1]
    ] + ["original"]
    alike = charts(made, [low, low])[0]
    assert alike.top - alike.bottom == pytest.approx(2 * 0.08 * 0.1)


def test_the_script_gets_the_values_of_every_point(page):
    made = front_of()
    data = data_of(page.read_text())
    shown = {each["name"]: each for each in data["points"]}
    assert (data["metric"], data["original"], data["best"]) == ("accuracy", "original", "best")
    assert (data["sizes"], data["limits"]) == ([1, 128], made.limits)
    kinds = {point.name: "original" for point in made.dominated} | {point.name: "artifact" for point in made.points}
    kinds |= {point.name: "baseline" for point in made.baselines}
    assert {name: each["kind"] for name, each in shown.items()} == kinds
    for point in (*made.points, *made.dominated):
        each = shown[point.name]
        assert each["latency"] == {str(size): value for size, value in point.latency_ms.items()}
        assert each["validation"] == pytest.approx(point.validation, abs=1e-4)
        assert (each["megabytes"], each["macs"]) == pytest.approx((point.bytes / 1e6, point.macs / 1e6))
        assert (each["steps"], each["test"]) == (point.steps, point.test)
    order = [(each["family"] != "free baselines", each["latency"]["1"]) for each in data["points"]]
    assert order == sorted(order)


def test_latencies_have_errors_in_table_charts_and_script_data(tmp_path):
    made = front_of(0)
    best = made.points[0].model_copy(update={"latency_error": {1: 0.03, 128: 0.02}})
    text = write_front_page(tmp_path, made.model_copy(update={"points": [best], "dominated": []})).read_text()
    shown = {"1": "0.600 ± 0.018", "128": "47.3 ± 1.0"}
    assert {each["name"]: each["milliseconds"] for each in data_of(text)["points"]}["best"] == shown
    for size, milliseconds in shown.items():
        assert f"<td>{milliseconds}</td>" in text
        assert f"93.40 %, {milliseconds} ms at batch {size}" in text
    assert "± is half the width of the 95 % interval. Latencies and intervals are computed from" in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_every_control_works_in_chromium(page):
    with chromium() as browser:
        for width in (1280, 390):
            browser.open(page, width, "light")
            assert browser.value("document.scrollingElement.scrollWidth") <= width
        _axes(browser)
        _families(browser)
        _pair(browser)
        _keyboard(browser)
        browser.ask("Emulation.setEmulatedMedia", media="print")
        displayed = "[...document.querySelectorAll('.controls')].map(e => getComputedStyle(e).display).join()"
        assert browser.value(displayed) == "none,none"
        assert browser.complaints == []
        assert {url for url in browser.requests if not url.startswith("data:")} == {page.as_uri()}


def test_the_report_command_renders_the_page_of_a_search_again(tmp_path, monkeypatch):
    write(tmp_path, front_of(3))
    (tmp_path / "front.json").write_text(front_of(3).model_dump_json())
    page = write_front_page(tmp_path, front_of(3)).read_bytes()
    (tmp_path / "report.html").unlink()
    monkeypatch.setattr("sys.argv", ["tersor", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert (tmp_path / "report.html").read_bytes() == page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_an_unfinished_search_shows_its_points(tmp_path):
    with chromium() as browser:
        browser.open(write_front_page(tmp_path, front_of(3)), 1280, "dark")
        assert browser.value("document.querySelectorAll('#chart circle').length") == 7
        assert "at the end of a search" in browser.value("document.getElementById('pair').textContent")
        assert browser.complaints == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_without_scripts_the_page_shows_charts_and_table(page):
    with chromium() as browser:
        browser.ask("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(page, 390, "light")
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)
        assert browser.value("document.getElementById('explorer').hidden") is True
        assert browser.value("document.querySelectorAll('#static svg circle').length") == 4 * 203
        assert browser.value("document.querySelectorAll('tbody tr').length") >= 203


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_an_axis_between_two_and_five_has_labels_at_both_ends(tmp_path):
    made = front_of(0)
    baselines = [each.model_copy(update={"latency_ms": {1: 2.3, 128: 200.0}}) for each in made.baselines]
    best = made.points[0].model_copy(update={"latency_ms": {1: 4.5, 128: 200.0}})
    limits = {**made.limits, "latency_ms": {}}
    changed = {"baselines": baselines, "points": [best], "dominated": [], "best": best.name, "limits": limits}
    with chromium() as browser:
        browser.open(write_front_page(tmp_path, made.model_copy(update=changed)), 1280, "light")
        labels = browser.value("[...document.querySelectorAll('#chart text')].map(e => e.textContent)")
        assert labels[:2] == ["2.3", "4.5"]
        assert browser.complaints == []


def select(browser, control, value):
    browser.value(f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('change')) }})({id_of(control)})")


def id_of(control):
    return f"document.getElementById({control!r})"


def circles(browser):
    return browser.value("document.querySelectorAll('#chart circle').length")


def _axes(browser):
    label = f"{id_of('chart')}.getAttribute('aria-label')"
    for axis, title in [("megabytes", "MB"), ("macs", "million MACs"), ("latency", "ms at batch 1")]:
        select(browser, "x", axis)
        assert browser.value(label) == f"203 points: accuracy on the validation images, % against {title}"
    select(browser, "batch", "128")
    assert "against ms at batch 128" in browser.value(label)
    assert "Time by operator, batch 128" in browser.value(f"{id_of('pair')}.textContent")
    select(browser, "x", "peak")
    assert circles(browser) == 202, "one point has no peak"
    select(browser, "y", "test")
    assert 2 < circles(browser) < 100, "the points that ran on the test images"
    select(browser, "y", "validation")
    select(browser, "x", "latency")
    select(browser, "batch", "1")


def _families(browser):
    browser.value("document.querySelector('#families input[value=\"student networks\"]').click()")
    assert circles(browser) == 154
    assert browser.value(f"{id_of('shown')}.textContent") == f"{circles(browser)} of 203 points shown."
    browser.value("document.querySelector('#families input[value=\"student networks\"]').click()")
    assert circles(browser) == 203


def _pair(browser):
    text = f"{id_of('pair')}.textContent"
    assert browser.value(f"{id_of('first')}.value + {id_of('second')}.value") == "originalbest"
    for part in (
        "prediction agreement of the two, %97.50",
        "Score by class",
        "cat93.092.4−0.60 points",
        "latency at batch 1, ms2.000.6003.33x lower",
        "layer55.conv",
    ):
        assert part in browser.value(text), part
    assert browser.value("document.querySelectorAll('#pair img').length") == 24
    browser.value("document.querySelector('#chart circle[data-name=t1]').dispatchEvent(new MouseEvent('mouseenter'))")
    assert "1 branch removed" in browser.value(f"{id_of('tip')}.textContent")
    assert browser.value(f"{id_of('tip')}.hidden") is False
    browser.value("document.querySelector('#chart circle[data-name=t1]').dispatchEvent(new MouseEvent('click'))")
    assert browser.value(f"{id_of('first')}.value + ' ' + {id_of('second')}.value") == "best t1"
    select(browser, "second", "original-8bit")
    chosen = browser.value("[...document.querySelectorAll('#chart .chosen')].map(e => e.dataset.name).sort().join()")
    assert chosen == "best,original-8bit"


def _keyboard(browser):
    browser.value("document.querySelector('#chart circle[tabindex=\"0\"]').focus()")
    before = browser.value("document.activeElement.dataset.name")
    browser.press("ArrowRight", 39)
    after = browser.value("document.activeElement.dataset.name")
    assert after != before
    browser.press("ArrowLeft", 37)
    assert browser.value("document.activeElement.dataset.name") == before
    browser.press("End", 35)
    last = browser.value("document.activeElement.dataset.name")
    browser.press("Enter", 13)
    assert browser.value(f"{id_of('second')}.value") == last
    assert browser.value("document.activeElement.getAttribute('aria-pressed')") == "true"
