"""The peak throughput, and the fraction of it that a network reaches."""

from types import SimpleNamespace

import numpy as np
import pytest

from tersor.evaluation import multiply_peak
from tersor.evaluation.multiply_peak import multiply_peaks, share_of_peak
from tersor.evaluation.node_profile import node_times
from tersor.evaluation.results import Peak
from tersor.evaluation.session import open_session


def peak(precision, rate, runtime="onnxruntime"):
    return Peak(runtime=runtime, precision=precision, macs_per_second=rate, median=rate, n=3)


PEAKS = [peak("float32", 1e11), peak("int8", 4e11), peak("float32", 2e11, "openvino")]


@pytest.mark.parametrize(
    ("runtime", "integers", "share"),
    [
        ("onnxruntime", 0.0, 0.5),  # 1e9 MACs take 10 ms at 1e11
        ("onnxruntime", 1.0, 0.125),
        ("onnxruntime", 0.5, 0.5 * 0.5 + 0.5 * 0.125),
        ("openvino", 0.0, 0.25),
        ("openvino", 1.0, None),  # no int8 peak of OpenVINO
    ],
)
def test_the_share_of_the_peak_is_the_time_at_the_peak_divided_by_the_latency(runtime, integers, share):
    assert share_of_peak(runtime, "float32", 10**9, 20.0, PEAKS, integers) == (share and pytest.approx(share))


def test_peaks_are_measured_once_for_float_and_for_integers(monkeypatch):
    monkeypatch.setattr(multiply_peak, "_LEAST_RUNS", 3)
    multiply_peak._known.cache_clear()
    peaks = multiply_peaks(["onnxruntime"])
    assert multiply_peaks(["onnxruntime"]) == peaks
    multiply_peak._known.cache_clear()
    assert [(each.precision, each.n) for each in peaks] == [("float32", 3), ("int8", 3)]
    assert all(each.macs_per_second >= each.median > 0 for each in peaks)


def test_the_integer_network_contains_no_float_convolution(tmp_path):
    path = multiply_peak._write(tmp_path / "peak.onnx", "int8")
    times = node_times(path, "onnxruntime", np.zeros((1, 256, 14, 14), np.float32), runs=1)
    kinds = {each.kind for each in times}
    image = np.random.default_rng(1).standard_normal((1, 256, 14, 14), np.float32)
    exact = open_session(multiply_peak._write(tmp_path / "float.onnx", "float32"), "onnxruntime").run(image)
    found = open_session(path, "onnxruntime").run(image)
    assert exact.shape == image.shape
    assert np.abs(found - exact).mean() < 0.1 * np.abs(exact).mean(), "both have the same weights"
    assert "QLinearConv" in kinds
    assert not kinds & {"Conv", "FusedConv"}


@pytest.mark.parametrize(("least", "seconds", "runs"), [(3, 0.0, 3), (1, 1.7, 3), (2, 0.5, 2)])
def test_the_peak_is_computed_from_the_fastest_run(monkeypatch, least, seconds, runs):
    """Three runs take 0.5, 0.25 and 1 s."""
    times = iter([0.0, 0.5, 2.0, 2.25, 3.0, 4.0])
    monkeypatch.setattr(multiply_peak, "_LEAST_RUNS", least)
    monkeypatch.setattr(multiply_peak, "_SECONDS", seconds)
    monkeypatch.setattr(multiply_peak.time, "perf_counter", lambda: next(times))
    session = SimpleNamespace(runtime="openvino", run=lambda _: None, infer=lambda _: None)
    found = multiply_peak._measure(session, "int8", np.zeros((2, 1)))
    assert (found.runtime, found.precision, found.n) == ("openvino", "int8", runs)
    assert found.macs_per_second == pytest.approx(2 * multiply_peak._MACS / 0.25)
    assert found.median == pytest.approx(2 * multiply_peak._MACS / (0.5 if runs == 3 else 1 / 3))
