from __future__ import annotations

import dataclasses
import zlib
from importlib.util import find_spec

import numpy as np
import onnx
import pytest

from tersor.core.errors import InputError
from tersor.export import bench
from tersor.export.bench import Spread, Timings, compressed_bytes, footprint, latency, predictions, size_bytes
from tersor.export.runtime import Session, open_session

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def pretended(infer) -> Session:
    return Session("onnxruntime", "float32", 1, np.dtype(np.float32), (None, 3, 8, 8), infer)


def test_predictions_are_the_largest_logits_of_all_batches(tiny):
    session = open_session(tiny.path, "onnxruntime")
    answers = predictions(session, [tiny.images[:4], tiny.images[4:]])
    np.testing.assert_array_equal(answers, tiny.logits.argmax(axis=1))
    assert answers.dtype == np.int64


def test_predictions_of_no_images_are_empty(tiny):
    assert predictions(open_session(tiny.path, "onnxruntime"), []).shape == (0,)


def test_what_does_not_classify_is_refused(tiny):
    with pytest.raises(InputError, match=r"logits \(6, classes\).*shape \(6, 3, 8, 8\)"):
        predictions(pretended(lambda array: array), [tiny.images])


def test_latency_times_every_contender_at_every_size(tiny):
    session = open_session(tiny.path, "onnxruntime")
    again = open_session(tiny.path, "onnxruntime")
    timings = latency({"one": session, "two": again}, tiny.images[:1], (1, 4), rounds=12)
    for name in ("one", "two"):
        for batch_size in (1, 4):
            spread = timings.spread(name, batch_size)
            assert spread.n == 12
            assert 0 < spread.p10 <= spread.median <= spread.p90
    assert 0.2 < timings.paired_ratio("one", "two", 1).median < 5  # of microseconds, beside other tests


def test_every_round_runs_everyone_and_the_order_changes(monkeypatch, tiny):
    taken = []

    def turn(session, batch, runs):
        taken.append(session.runtime)
        return 1.0

    monkeypatch.setattr(bench, "_turn", turn)
    names = ["a", "b", "c"]
    sessions = {name: dataclasses.replace(pretended(lambda array: array), runtime=name) for name in names}
    latency(sessions, tiny.images[:1], (1,), rounds=20)
    rounds = [tuple(taken[place : place + 3]) for place in range(3, len(taken), 3)]  # the first three warm up
    assert len(rounds) == 20
    assert all(sorted(order) == names for order in rounds)
    assert len(set(rounds)) > 1


def test_time_that_is_up_ends_the_rounds_but_not_before_five(tiny):
    session = open_session(tiny.path, "onnxruntime")
    timings = latency({"one": session}, tiny.images[:1], (1,), rounds=1000, seconds=0)
    assert timings.spread("one", 1).n == 5


def test_latency_refuses_an_example_of_another_size(tiny):
    session = open_session(tiny.path, "onnxruntime")
    with pytest.raises(InputError, match=r"shape \(any, 3, 8, 8\)"):
        latency({"one": session}, np.zeros((1, 3, 9, 9), np.float32), (1,))


def test_ratios_pair_the_runs_of_a_round():
    drifting = Timings({"slow": {1: [2.0, 20.0, 200.0]}, "fast": {1: [1.0, 10.0, 100.0]}})
    assert drifting.paired_ratio("slow", "fast", 1) == Spread(2.0, 2.0, 2.0, 3)
    assert drifting.paired_ratio("fast", "slow", 1).median == 0.5


def test_a_spread_is_made_of_percentiles():
    assert Spread.of([float(value) for value in range(101)]) == Spread(50.0, 10.0, 90.0, 101)


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_footprint_measures_the_file_and_not_this_process(tiny, runtime):
    ballast = np.ones(2**26)  # 512 MB here must not be found there
    measured = footprint(tiny.path, runtime, tiny.images[:1], threads=1)
    assert measured.load_ms > 0
    assert 0 < measured.peak_memory_bytes < ballast.nbytes / 2


def test_footprint_tells_why_a_file_was_refused(tiny):
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


def test_size_counts_every_file_that_the_runtime_needs(tmp_path, tiny):
    assert size_bytes(tiny.path) == tiny.path.stat().st_size

    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(tiny.path), outside, save_as_external_data=True, location="outside.data", size_threshold=0)
    data = outside.with_name("outside.data")
    assert size_bytes(outside) == outside.stat().st_size + data.stat().st_size
    assert compressed_bytes(outside) == sum(len(zlib.compress(file.read_bytes())) for file in (outside, data))
    data.unlink()
    with pytest.raises(InputError, match=r"needs .*outside\.data"):
        size_bytes(outside)


def test_size_counts_the_weights_beside_an_xml(tmp_path):
    xml = tmp_path / "net.xml"
    xml.write_bytes(b"x" * 10)
    with pytest.raises(InputError, match=r"needs .*net\.bin"):
        size_bytes(xml)
    xml.with_suffix(".bin").write_bytes(b"x" * 7)
    assert size_bytes(xml) == 17


def test_size_of_what_is_no_network_is_refused(tmp_path):
    path = tmp_path / "text.onnx"
    with pytest.raises(InputError, match="there is no file"):
        size_bytes(path)
    path.write_text("text" * 100)
    with pytest.raises(InputError, match="not an ONNX file"):
        size_bytes(path)
