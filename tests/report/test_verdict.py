from __future__ import annotations

import pytest
from samples import alone, entry, evidence_of, numbers_at, numbers_of, profile_of, ratio_of, speedups

from tersor.report.verdict import by_batch_size, difference, points_change, reference, size_change, verdict

BF16 = {"runtime": "openvino", "precision": "bfloat16"}


def test_faster_than_both():
    assert verdict(numbers_of()) == (
        "4.0x faster (3.8 to 4.2) than the original and 2.0x faster (1.9 to 2.1) than the baseline at batch 1, "
        "4.0x smaller, 0.4 points lost."
    )


def test_where_the_original_is_the_baseline_there_is_one_ratio():
    assert verdict(alone(1.0)) == (
        "4.0x faster (3.8 to 4.2) than the original, which is also the baseline, at batch 1, 4.0x smaller, "
        "no points lost."
    )


def test_faster_than_the_original_alone():
    assert verdict(numbers_at(3.0, artifact=entry(3.0, size=1_000_000, macs=5_000_000))) == (
        "1.3x faster (1.3 to 1.4) than the original, but 1.5x slower (1.4 to 1.6) than the baseline at batch 1, "
        "4.0x smaller, no points lost. Possible reasons: the baseline uses the bfloat16 units of this CPU. "
        "Ship original.onnx in OpenVINO (bfloat16) instead."
    )


def test_slower_than_both():
    assert verdict(numbers_at(8.0)) == (
        "2.0x slower (1.9 to 2.1) than the original and 4.0x slower (3.8 to 4.2) than the baseline at batch 1, "
        "4.0x smaller, no points lost. Possible reasons: the baseline uses the bfloat16 units of this CPU; the "
        "artifact still does all 10.0 million multiplications. Ship original.onnx in OpenVINO (bfloat16) instead."
    )


def test_no_difference_from_either():
    numbers = numbers_at(4.0, speedup=speedups(1.01, 0.98))
    assert verdict(numbers).startswith(
        "no measurable difference from the original (0.96x to 1.06x) and no measurable difference from the baseline "
        "(0.93x to 1.03x) at batch 1, 4.0x smaller"
    )
    assert verdict(numbers).endswith("Ship model.onnx in ONNX Runtime for its size alone.")


@pytest.mark.parametrize(
    ("ratio", "told"),
    [
        (ratio_of(2.4, 0.12), "2.4x faster (2.1 to 2.7)"),
        (ratio_of(1 / 2.4, 0.1), "2.4x slower (2.2 to 2.7)"),
        (ratio_of(1.03, 0.02), "1.03x faster (1.01 to 1.05)"),
        (ratio_of(1.01, 0.005), "1.010x faster (1.005 to 1.015)"),
        (ratio_of(1.41, 0.001), "1.41x faster (1.41 to 1.41)"),
        ({"value": 3.0, "low": 1.02, "high": 9.0}, "3.00x faster (1.02 to 9.00)"),
        (ratio_of(1.03, 0.05), "no measurable difference (0.98x to 1.08x)"),
        ({"value": 1.1, "low": 1.0, "high": 1.2}, "no measurable difference (1.00x to 1.20x)"),
        ({"value": 1.0, "low": 1.0, "high": 1.0}, "no measurable difference (1.00x to 1.00x)"),
    ],
)
def test_a_difference_has_its_interval(ratio, told):
    assert difference(ratio) == told


def test_the_baseline_is_that_of_the_batch_size():
    numbers = numbers_of()
    numbers["baseline"]["32"] = {"runtime": "onnxruntime", "precision": "float32"}
    assert reference(numbers, "baseline", "1") == numbers["candidates"]["openvino"]
    assert reference(numbers, "baseline", "32") == numbers["candidates"]["onnxruntime"]
    assert reference(numbers, "original", "32") == numbers["original"]


def test_the_profile_says_why():
    profile = {"artifact": profile_of(("QLinearConv", 1.0), ("QuantizeLinear", 0.6), ("ReorderInput", 0.4))}
    told = verdict(alone(8.0), evidence_of(profile={"1": profile}))
    assert (
        "Possible reasons: 50 % of its node time is spent on quantizing and on converting between layouts; the artifact"
        in told
    )
    few = {"artifact": profile_of(("QLinearConv", 9.0), ("QuantizeLinear", 1.0))}
    assert "node time" not in verdict(alone(8.0), evidence_of(profile={"1": few}))


def test_masked_weights_say_why():
    artifact = entry(8.0) | {"sparsity": 0.9}
    assert "all 10.0 million multiplications, zeros included" in verdict(alone(8.0, artifact=artifact))


@pytest.mark.parametrize(("kind", "bits", "told"), [("avx2", 8, True), ("vnni", 8, False), ("avx2", 32, False)])
def test_a_processor_without_vnni_says_why(kind, bits, told):
    numbers = alone(8.0, artifact=entry(8.0, bits=bits, macs=5_000_000))
    numbers["machine"]["cpu_kind"] = kind
    assert ("(VNNI)" in verdict(numbers)) is told


def test_where_nothing_says_why_nothing_is_made_up():
    told = verdict(alone(8.0, artifact=entry(8.0, macs=5_000_000)))
    assert "reasons" not in told
    assert told.endswith("Ship original.onnx in ONNX Runtime (float32) instead.")


def test_as_fast_but_not_small_is_not_shipped():
    told = verdict(alone(4.0, artifact=entry(4.0)))
    assert "Ship original.onnx in ONNX Runtime (float32) instead." in told


def test_as_fast_and_small_but_wrong_is_not_shipped():
    told = verdict(alone(4.0, artifact=entry(4.0, accuracy=88.9, size=1_000_000)))
    assert "Ship original.onnx in ONNX Runtime (float32) instead." in told


@pytest.mark.parametrize(
    ("ms", "told"),
    [
        (8.0, "Ship original.onnx in ONNX Runtime (float32) instead."),
        (3.0, "Ship model.onnx in ONNX Runtime: the baseline loses more than one point."),
    ],
)
def test_a_baseline_that_loses_more_than_a_point_is_not_advised(ms, told):
    candidates = {"onnxruntime": entry(4.0), "openvino": entry(1.0, accuracy=88.9, **BF16)}
    assert verdict(numbers_at(ms, candidates=candidates, speedup=speedups(4 / ms, 1 / ms))).endswith(told)


def test_larger_batches_are_told_where_it_is_faster():
    numbers = numbers_at(8.0)
    numbers["speedup"]["baseline"]["32"] = ratio_of(4.0)
    assert verdict(numbers).endswith(" It is 4.0x faster (3.8 to 4.2) than the baseline at batch 32.")


@pytest.mark.parametrize(
    ("told", "line"),
    [({"1": "a", "32": "a"}, "a"), ({"1": "a", "32": "b", "128": "b"}, "a at batch 1, b at batch 32 and 128")],
)
def test_batch_sizes_of_the_same_are_told_together(told, line):
    assert by_batch_size(told) == line


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
