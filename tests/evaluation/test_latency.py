from __future__ import annotations

import dataclasses
import zlib
from functools import partial
from importlib.util import find_spec
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from tersor.core.errors import InputError
from tersor.evaluation import latency
from tersor.evaluation.file_inputs import FileInput
from tersor.evaluation.latency import compressed_bytes, footprint, measure_latency, size_bytes
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import Session, open_session
from tersor.evaluation.timings import Ratio

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def fake_session(infer) -> Session:
    return Session("onnxruntime", "float32", 1, (FileInput("images", np.dtype(np.float32), (None, 3, 8, 8)),), infer)


def test_predictions_are_the_argmax_of_the_logits_of_all_batches(tiny):
    session = open_session(tiny.path, "onnxruntime")
    predictions = file_predictions(session, [tiny.images[:4], tiny.images[4:]])
    np.testing.assert_array_equal(predictions, tiny.logits.argmax(axis=1))
    assert predictions.dtype == torch.int64


def test_without_images_there_are_no_predictions(tiny):
    assert file_predictions(open_session(tiny.path, "onnxruntime"), []) is None


def test_an_output_that_is_not_logits_raises(tiny):
    with pytest.raises(InputError, match=r"logits \(N, classes\).*shape \(6, 3, 8, 8\)"):
        file_predictions(fake_session(lambda array: array), [tiny.images])


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: a run takes `clock.ms(name)`, opening a session takes no time; `clock.log` lists both."""

    class Clock:
        def __init__(self):
            self.log, self.ms, self.now = [], lambda _name: 1.0, 0.0

        def opener(self, name):
            def opened():
                self.log.append(("open", name))
                return dataclasses.replace(fake_session(lambda array: array), runtime=name)

            return opened

        def time_runs(self, session, _batch, runs):
            taken = self.ms(session.runtime)
            self.log.append(("run", session.runtime))
            self.now += (1 + runs) * taken / 1000
            return taken

    clock = Clock()
    monkeypatch.setattr(latency, "_time_runs", clock.time_runs)
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_every_model_is_timed_at_every_batch_size(tiny, monkeypatch):
    monkeypatch.setattr(latency, "_MIN_GROUPS", 2)
    openers = {name: partial(open_session, tiny.path, "onnxruntime") for name in ("one", "two")}
    timings = measure_latency(openers, tiny.images[:1], (1, 4), seconds=0.01)
    for name in openers:
        for batch_size in (1, 4):
            spread = timings.spread(name, batch_size)
            assert spread.n == sum(map(len, timings.groups[name][batch_size])) >= 2
            assert 0 < spread.p10 <= spread.median <= spread.p90
            assert timings.ended_by[batch_size] in {"interval", "time"}


def test_every_round_runs_every_model_in_balanced_order(clock, tiny):
    names = ["a", "b", "c"]
    measure_latency({name: clock.opener(name) for name in names}, tiny.images[:1], (1,))
    runs = [name for what, name in clock.log if what == "run"][3:]  # the first three warm up
    rounds = [tuple(runs[place : place + 3]) for place in range(0, len(runs), 3)]
    assert len(rounds) == 8 * 20
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) > 2
    for one, other in combinations(names, 2):
        assert sum(order.index(one) < order.index(other) for order in rounds) == 80


def test_every_group_opens_all_sessions_again_in_balanced_order(clock, tiny):
    timings = measure_latency({name: clock.opener(name) for name in ("a", "b")}, tiny.images[:1], (1, 4))
    opened = [name for what, name in clock.log if what == "open"]
    assert len(opened) == 2 * 8, "both sizes share the sessions of a group"
    assert opened[::2].count("a") == 4
    assert [len(group) for group in timings.groups["a"][4]] == [20] * 8
    between = clock.log.index(("open", "a"), 20), clock.log.index(("run", "a"), 20)
    assert between[1] < between[0], "the first group is timed before the second is opened"


def test_measuring_ends_when_every_interval_is_narrow(clock, tiny):
    timings = measure_latency({name: clock.opener(name) for name in ("a", "b")}, tiny.images[:1], (1,), seconds=1000)
    assert timings.ended_by == {1: "interval"}
    assert timings.ratio("a", "b", 1).groups == 8


def test_the_time_limit_ends_the_rounds_after_at_least_eight_groups(clock, tiny):
    draw = np.random.default_rng(0)
    clock.ms = lambda _name: float(draw.lognormal(0, 1))
    openers = {name: clock.opener(name) for name in ("a", "b")}
    timings = measure_latency(openers, tiny.images[:1], (1,), seconds=0)
    assert timings.ended_by == {1: "time"}
    assert [len(group) for group in timings.groups["a"][1]] == [1] * 8
    clock.now = 0
    longer = measure_latency(openers, tiny.images[:1], (1,), seconds=2)
    assert longer.ended_by == {1: "time"}
    assert longer.ratio("a", "b", 1).groups > 8
    assert 2 < clock.now < 2.5


def test_only_the_requested_ratios_have_to_be_narrow(clock, tiny):
    draw = np.random.default_rng(0)
    clock.ms = lambda name: float(draw.lognormal(0, 1)) if name == "noisy" else 1.0
    openers = {name: clock.opener(name) for name in ("a", "b", "noisy")}
    requested = lambda timings, size: [timings.ratio("a", "b", size)]  # noqa: E731
    assert measure_latency(openers, tiny.images[:1], (1,), ratios=requested, seconds=1).ended_by == {1: "interval"}
    assert measure_latency(openers, tiny.images[:1], (1,), seconds=1).ended_by == {1: "time"}


def test_a_finished_batch_size_gets_no_more_rounds(clock, tiny, monkeypatch):
    requested = lambda timings, size: [timings.ratio("a", "b", size)] if size == 1 else [Ratio(1, 0, 9, 1, 1)]  # noqa: E731
    openers = {name: clock.opener(name) for name in ("a", "b")}
    timings = measure_latency(openers, tiny.images[:1], (1, 4), ratios=requested, seconds=2)
    assert timings.ended_by == {1: "interval", 4: "time"}
    assert len(timings.groups["a"][1]) == 8 < len(timings.groups["a"][4])


def test_an_example_of_the_wrong_size_raises(tiny):
    with pytest.raises(InputError, match=r"shape \(any, 3, 8, 8\)"):
        measure_latency(
            {"one": partial(open_session, tiny.path, "onnxruntime")}, np.zeros((1, 3, 9, 9), np.float32), (1,)
        )


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_footprint_excludes_the_memory_of_this_process(tiny, runtime):
    ballast = np.ones(2**26)  # 512 MB in this process must not be counted
    measured = footprint(tiny.path, runtime, tiny.images[:1], threads=1)
    assert measured.load_ms > 0
    assert 0 < measured.peak_memory_bytes < ballast.nbytes / 2


def test_footprint_raises_if_the_file_does_not_exist(tiny):
    with pytest.raises(InputError, match=r"there is no file .*absent\.onnx"):
        footprint(tiny.path.with_name("absent.onnx"), "onnxruntime", tiny.images[:1])


def test_footprint_grows_with_the_network(tmp_path, tiny):
    proto = onnx.load(tiny.path)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 2**21), np.float32), "wide"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((2**21, 5), np.float32), "narrow"))
    proto.graph.node[-1].output[0] = "small"
    for number, (left, right, out) in enumerate([("features", "wide", "large"), ("large", "narrow", "added")]):
        proto.graph.node.append(onnx.helper.make_node("MatMul", [left, right], [out], name=f"wide{number}"))
    proto.graph.node.append(onnx.helper.make_node("Add", ["small", "added"], ["logits"]))
    large = tmp_path / "large.onnx"
    onnx.save(proto, large)
    weights = 4 * 9 * 2**21
    small = footprint(tiny.path, "onnxruntime", tiny.images[:1]).peak_memory_bytes
    assert footprint(large, "onnxruntime", tiny.images[:1]).peak_memory_bytes > small + 0.9 * weights


def test_size_includes_external_data(tmp_path, tiny):
    assert size_bytes(tiny.path) == tiny.path.stat().st_size

    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(tiny.path), outside, save_as_external_data=True, location="outside.data", size_threshold=0)
    data = outside.with_name("outside.data")
    assert size_bytes(outside) == outside.stat().st_size + data.stat().st_size
    assert compressed_bytes(outside) == sum(len(zlib.compress(file.read_bytes())) for file in (outside, data))
    data.unlink()
    with pytest.raises(InputError, match=r"needs .*outside\.data"):
        size_bytes(outside)


def test_size_of_an_openvino_xml_includes_its_weights(tmp_path):
    xml = tmp_path / "net.xml"
    xml.write_bytes(b"x" * 10)
    with pytest.raises(InputError, match=r"needs .*net\.bin"):
        size_bytes(xml)
    xml.with_suffix(".bin").write_bytes(b"x" * 7)
    assert size_bytes(xml) == 17


def test_the_size_of_a_file_that_is_not_a_network_raises(tmp_path):
    path = tmp_path / "text.onnx"
    with pytest.raises(InputError, match="there is no file"):
        size_bytes(path)
    path.write_text("text" * 100)
    with pytest.raises(InputError, match=r"text\.onnx is damaged or not an ONNX file"):
        size_bytes(path)
