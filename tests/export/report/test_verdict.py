from __future__ import annotations

import pytest
from samples import entry, evidence_of, numbers_of, profile_of

from tersor.export.report.verdict import points_change, ratio_beyond_noise, size_change, speedup, verdict

INTEGER = {"size": 1_000_000, "bits": 8}
BF16 = {"runtime": "openvino", "precision": "bfloat16"}


def test_faster():
    assert verdict(numbers_of()) == "4.0x faster at batch 1, 4.0x smaller, 0.4 points lost."


def test_faster_than_bf16():
    assert (
        verdict(numbers_of(), "bf16") == "2.0x faster than OpenVINO's bf16 at batch 1, 4.0x smaller, 0.3 points lost."
    )


def test_where_the_processor_has_no_bf16_it_is_not_called_so():
    told = verdict(numbers_of(bf16=entry(2.0, runtime="openvino")), "bf16")
    assert told.startswith("2.0x faster than OpenVINO's float32")


def test_a_little_faster_is_told_in_percent():
    floor = {"1": {"p10": 0.99, "p90": 1.01}, "32": {"p10": 0.99, "p90": 1.01}}
    told = verdict(numbers_of(artifact=entry(3.85, **INTEGER), noise_floor=floor))
    assert told.startswith("4 % faster at batch 1")
    told = verdict(numbers_of(artifact=entry(4.15, **INTEGER), noise_floor=floor))
    assert "(4 % slower)" in told


def test_slower_says_why_and_what_to_ship():
    numbers = numbers_of(artifact=entry(8.0, **INTEGER))
    assert verdict(numbers) == (
        "not faster on this CPU at batch 1 (2.0x slower), because it still does all 10.0 million multiplications; "
        "ship original.onnx in OpenVINO (bfloat16) instead. It is 4.0x smaller, no points lost."
    )


def test_the_profile_says_why():
    profile = {"artifact": profile_of(("QLinearConv", 1.0), ("QuantizeLinear", 0.6), ("ReorderInput", 0.4))}
    told = verdict(numbers_of(artifact=entry(8.0, **INTEGER)), "original", evidence_of(profile={"1": profile}))
    assert "because 50 % of its node time goes into rounding and converting between layouts and it still does" in told
    few = {"artifact": profile_of(("QLinearConv", 9.0), ("QuantizeLinear", 1.0))}
    told = verdict(numbers_of(artifact=entry(8.0, **INTEGER)), "original", evidence_of(profile={"1": few}))
    assert "rounding" not in told


def test_bf16_units_say_why():
    told = verdict(numbers_of(artifact=entry(8.0, **INTEGER)), "bf16")
    assert told.startswith("not faster than OpenVINO's bf16 on this CPU at batch 1 (4.0x slower), because this CPU mul")


def test_masked_weights_say_why():
    artifact = entry(8.0) | {"sparsity": 0.9}
    assert "all 10.0 million multiplications, zeros among them" in verdict(numbers_of(artifact=artifact))


@pytest.mark.parametrize(("kind", "bits", "told"), [("avx2", 8, True), ("vnni", 8, False), ("avx2", 32, False)])
def test_a_processor_without_vnni_says_why(kind, bits, told):
    numbers = numbers_of(artifact=entry(8.0, bits=bits, macs=5_000_000))
    numbers["machine"]["cpu_kind"] = kind
    assert ("(VNNI)" in verdict(numbers)) is told


def test_where_nothing_says_why_nothing_is_made_up():
    told = verdict(numbers_of(artifact=entry(8.0, macs=5_000_000)))
    assert "because what it saves does not show at one image;" in told


@pytest.mark.parametrize("ms", [3.92, 4.08])
def test_within_the_noise_is_neither(ms):
    told = verdict(numbers_of(artifact=entry(ms, **INTEGER), bf16=None))
    assert told.startswith("not faster on this CPU at batch 1 (the same within the noise)")
    assert "ship model.onnx in ONNX Runtime for its size alone." in told


def test_as_fast_but_not_small_is_not_shipped():
    assert "ship original.onnx in ONNX Runtime instead." in verdict(numbers_of(artifact=entry(4.0), bf16=None))


def test_as_fast_and_small_but_wrong_is_not_shipped():
    numbers = numbers_of(artifact=entry(4.0, accuracy=88.9, **INTEGER), bf16=None)
    assert "ship original.onnx in ONNX Runtime instead." in verdict(numbers)


def test_what_loses_more_than_a_point_is_not_advised():
    told = verdict(numbers_of(artifact=entry(8.0), bf16=entry(1.0, accuracy=88.9, **BF16)))
    assert "ship original.onnx in ONNX Runtime instead." in told


def test_larger_batches_are_told_where_it_is_faster():
    artifact = entry(8.0, **INTEGER)
    artifact["latency_runs_ms"]["32"] = [1.0] * 5
    assert verdict(numbers_of(artifact=artifact)).endswith("no points lost, and 4.0x faster at batch 32.")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [(400, 100, "4.0x smaller"), (100, 150, "1.5x larger"), (100, 97, "of the same size")],
)
def test_size(before, after, told):
    assert size_change({"bytes": before}, {"bytes": after}) == told


@pytest.mark.parametrize(
    ("after", "told"),
    [(89.6, "0.4 points lost"), (90.62, "0.6 points gained"), (89.96, "0.04 points lost"), (90.0, "no points lost")],
)
def test_points(after, told):
    assert points_change(90.0, after) == told


def test_a_speedup_is_the_median_over_rounds():
    numbers = {name: {"latency_runs_ms": {"1": runs}} for name, runs in (("a", [2, 9, 4]), ("b", [1, 3, 4]))}
    assert speedup(numbers, "a", "b", "1") == 2


def test_noise_counts_in_both_directions():
    floor = {"1": {"p10": 0.5, "p90": 1.01}}
    numbers = {name: {"latency_runs_ms": {"1": [ms]}} for name, ms in (("a", 1.9), ("b", 1.0))}
    assert ratio_beyond_noise(numbers | {"noise_floor": floor}, "a", "b", "1") is None
    numbers["a"]["latency_runs_ms"]["1"] = [2.1]
    assert ratio_beyond_noise(numbers | {"noise_floor": floor}, "a", "b", "1") == 2.1
