"""The first line of the report: whether it was worth it, and what to ship where it was not."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

Baseline = Literal["original", "bf16"]

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

_MOST_POINTS_LOST = 1.0
_TELLING_SHARE = 0.2
_CONVERSIONS = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize", "Cast", "Convert"),
    *("Reorder", "ReorderInput", "ReorderOutput", "Transpose"),
}


def verdict(
    numbers: Mapping[str, Any], baseline: Baseline = "original", evidence: Mapping[str, Any] | None = None
) -> str:
    """One sentence: speed at batch 1, size and points against the baseline; where it is not faster, why, and what to
    ship instead: the fastest at batch 1 that loses at most one point.

    A ratio within the noise floor (the original against itself, 10th to 90th percentile) is no gain and no loss.

    Args:
        numbers: `numbers.json`; `bf16` is not None where it is the baseline.
        baseline: what the artifact is compared with.
        evidence: `evidence.json`, whose node profile may say why.
    """
    before, after = numbers[baseline], numbers["artifact"]
    against = f" than {entry_name(numbers, 'bf16')}" if baseline == "bf16" else ""
    faster = ratio_beyond_noise(numbers, baseline, "artifact", "1")
    facts = f"{size_change(before, after)}, {points_change(before['accuracy'], after['accuracy'])}"
    if faster is not None and faster > 1:
        return f"{faster:.1f}x faster{against} at batch 1, {facts}." if faster >= 1.05 else (
            f"{100 * (faster - 1):.0f} % faster{against} at batch 1, {facts}."
        )  # fmt: skip
    how = "the same within the noise" if faster is None else f"{1 / faster:.1f}x slower"
    if faster is not None and 1 / faster < 1.05:
        how = f"{100 * (1 / faster - 1):.0f} % slower"
    why = " and ".join(_reasons(numbers, baseline, evidence))
    return (
        f"not faster{against} on this CPU at batch 1 ({how}), because {why}; {_advice(numbers, baseline)} "
        f"It is {facts}{_elsewhere(numbers, baseline)}."
    )


def entry_name(numbers: Mapping[str, Any], entry: str) -> str:
    """What an entry is: "OpenVINO's bf16"; where the processor has none, the precision that was run instead."""
    if entry != "bf16":
        return {"original": "the original", "artifact": "the artifact"}[entry]
    precision = {"bfloat16": "bf16"}.get(numbers["bf16"]["precision"], numbers["bf16"]["precision"])
    return f"{RUNTIMES[numbers['bf16']['runtime']]}'s {precision}"


def file_and_runtime(numbers: Mapping[str, Any], entry: str) -> str:
    """What to ship: "original.onnx in OpenVINO (bfloat16)"."""
    file = "model.onnx" if entry == "artifact" else "original.onnx"
    told = numbers[entry]
    precision = f" ({told['precision']})" if entry == "bf16" else ""
    return f"{file} in {RUNTIMES[told['runtime']]}{precision}"


def speedup(numbers: Mapping[str, Any], slow: str, fast: str, size: str) -> float:
    """Median over the rounds of the time of `slow` over that of `fast`, both of the same round."""
    pairs = zip(numbers[slow]["latency_runs_ms"][size], numbers[fast]["latency_runs_ms"][size], strict=True)
    return median(theirs / ours for theirs, ours in pairs)


def ratio_beyond_noise(numbers: Mapping[str, Any], slow: str, fast: str, size: str) -> float | None:
    """`speedup`, or None where the original differs from itself as much."""
    floor = numbers["noise_floor"][size]
    edge = max(floor["p90"], 1 / floor["p10"], 1.0)
    ratio = speedup(numbers, slow, fast, size)
    return None if 1 / edge <= ratio <= edge else ratio


def size_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """ "4.2x smaller"; up to 5 % is the same size."""
    ratio = before["bytes"] / after["bytes"]
    if 1 / 1.05 < ratio < 1.05:
        return "of the same size"
    return f"{ratio:.1f}x smaller" if ratio > 1 else f"{1 / ratio:.1f}x larger"


def points_change(before: float, after: float) -> str:
    """ "0.4 points lost", of two accuracies in percent."""
    lost = before - after
    if abs(lost) < 0.005:
        return "no points lost"
    return f"{abs(lost):.{1 if abs(lost) >= 0.1 else 2}f} points {'lost' if lost > 0 else 'gained'}"


def _reasons(numbers: Mapping[str, Any], baseline: Baseline, evidence: Mapping[str, Any] | None) -> list[str]:
    """At most two, the most certain first."""
    before, after = numbers[baseline], numbers["artifact"]
    quantized = after["bit_operations"] < after["macs"] * 32 * 32
    reasons: list[str] = []
    share = _converting_share(evidence)
    if share >= _TELLING_SHARE:
        reasons.append(f"{100 * share:.0f} % of its node time goes into rounding and converting between layouts")
    if baseline == "bf16" and before["precision"] == "bfloat16":
        reasons.append("this CPU multiplies bfloat16 in units of its own")
    if after["macs"] > 0.95 * before["macs"]:
        masked = ", zeros among them" if after["sparsity"] > 0.3 else ""
        reasons.append(f"it still does all {after['macs'] / 1e6:.1f} million multiplications{masked}")
    if quantized and numbers["machine"]["cpu_kind"] == "avx2":
        reasons.append("this CPU has no instructions that add 8-bit products in 32 bits (VNNI)")
    return reasons[:2] or ["what it saves does not show at one image"]


def _converting_share(evidence: Mapping[str, Any] | None) -> float:
    profile = ((evidence or {}).get("profile") or {}).get("1", {}).get("artifact")
    if not profile or not profile["ms"]:
        return 0.0
    return sum(kind["ms"] for kind in profile["kinds"] if kind["kind"] in _CONVERSIONS) / profile["ms"]


def _advice(numbers: Mapping[str, Any], baseline: Baseline) -> str:
    """What to ship. The artifact itself only where nothing within one point is faster and it is smaller."""
    enough = numbers["original"]["accuracy"] - _MOST_POINTS_LOST
    entries = [name for name in ("original", "bf16") if numbers[name] and numbers[name]["accuracy"] >= enough]
    fastest = min(entries, key=lambda name: numbers[name]["latency_ms"]["1"]["median"])
    before, after = numbers[baseline], numbers["artifact"]
    as_fast = ratio_beyond_noise(numbers, fastest, "artifact", "1")
    if (as_fast is None or as_fast > 1) and after["accuracy"] >= enough and after["bytes"] * 1.05 < before["bytes"]:
        return f"ship {file_and_runtime(numbers, 'artifact')} for its size alone."
    return f"ship {file_and_runtime(numbers, fastest)} instead."


def _elsewhere(numbers: Mapping[str, Any], baseline: Baseline) -> str:
    """Where it is faster after all."""
    gains = {size: ratio_beyond_noise(numbers, baseline, "artifact", size) for size in numbers["noise_floor"]}
    told = [f"{gain:.1f}x faster at batch {size}" for size, gain in gains.items() if gain is not None and gain >= 1.05]
    return f", and {' and '.join(told)}" if told else ""
