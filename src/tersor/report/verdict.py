"""The first line of the report: the artifact against the original and the baseline, and which file to ship."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Reference = Literal["original", "baseline"]
Numbers = Mapping[str, Any]
Evidence = Mapping[str, Any]

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

_LARGEST_ACCURACY_LOSS = 1.0
"""In percentage points; a file that loses more is not recommended."""
_CONVERSION_SHARE = 0.2
"""Of the node time, from which conversions are named as a reason."""
_CONVERSIONS = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize", "Cast", "Convert"),
    *("Reorder", "ReorderInput", "ReorderOutput", "Transpose"),
}


def verdict(numbers: Numbers, evidence: Evidence | None = None) -> str:
    """Latency at batch 1 against the original and the baseline; size and accuracy against the original.

    If the artifact is not faster than the baseline, also possible reasons and which file to ship: the fastest at batch
    1 that loses at most one point of accuracy.

    Args:
        numbers: the content of `numbers.json`.
        evidence: the content of `evidence.json`, whose node profile may give a reason.
    """
    before, after = numbers["original"], numbers["artifact"]
    change = f"{size_change(before, after)}, {accuracy_change(before['accuracy'], after['accuracy'])}"
    sentences = [f"{_speedups(numbers)} at batch 1, {change}."]
    if not _faster(numbers["speedup"]["baseline"]["1"]):
        reasons = _reasons(numbers, evidence)
        sentences += [f"Possible reasons: {'; '.join(reasons)}."] if reasons else []
        sentences += [_recommendation(numbers), *_larger_batches(numbers)]
    return " ".join(sentences)


def describe_speedup(ratio: Mapping[str, float]) -> str:
    """ "2.4x faster (2.1 to 2.7)", with the 95 % confidence interval; "no measurable difference" if that contains 1."""
    if not _measurable(ratio):
        return f"no measurable difference {_interval(ratio)}"
    value, low, high = ratio["value"], ratio["low"], ratio["high"]
    if value < 1:
        value, low, high = 1 / value, 1 / high, 1 / low
    fewest = 1 if round(low, 1) < round(high, 1) else 2
    digits = next((digits for digits in (fewest, 2, 3) if round(low, digits) > 1), 4)
    word = "faster" if _faster(ratio) else "slower"
    return f"{value:.{digits}f}x {word} ({low:.{digits}f} to {high:.{digits}f})"


def reference_entry(numbers: Numbers, name: Reference, size: str) -> Mapping[str, Any]:
    """What was measured of the original or the baseline at a batch size."""
    if name == "original":
        return numbers["original"]
    return numbers["candidates"][numbers["baseline"][size]["runtime"]]


def runtime_of(entry: Mapping[str, Any]) -> str:
    """ "OpenVINO in bfloat16"."""
    return f"{RUNTIMES[entry['runtime']]} in {entry['precision']}"


def by_batch_size(texts: Mapping[str, str]) -> str:
    """Batch size -> text, in one line: "a at batch 1, b at batch 32 and 128"; only the text if all are the same."""
    sizes: dict[str, list[str]] = {}
    for size, text in texts.items():
        sizes.setdefault(text, []).append(size)
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{text} at batch {' and '.join(each)}" for text, each in sizes.items())


def same_runtime(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries have the same runtime and precision."""
    return (one["runtime"], one["precision"]) == (other["runtime"], other["precision"])


def size_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """ "4.2x smaller"; a difference below 5 % is "same size"."""
    ratio = before["bytes"] / after["bytes"]
    if 1 / 1.05 < ratio < 1.05:
        return "same size"
    return f"{ratio:.1f}x smaller" if ratio > 1 else f"{1 / ratio:.1f}x larger"


def accuracy_change(before: float, after: float) -> str:
    """ "accuracy 0.4 points lower", from two accuracies in percent."""
    lost = before - after
    if abs(lost) < 0.005:
        return "accuracy unchanged"
    return f"accuracy {abs(lost):.{1 if abs(lost) >= 0.1 else 2}f} points {'lower' if lost > 0 else 'higher'}"


def _measurable(ratio: Mapping[str, float]) -> bool:
    return not ratio["low"] <= 1 <= ratio["high"]


def _faster(ratio: Mapping[str, float]) -> bool:
    return ratio["low"] > 1


def _slower(ratio: Mapping[str, float]) -> bool:
    return ratio["high"] < 1


def _interval(ratio: Mapping[str, float]) -> str:
    return f"({ratio['low']:.2f}x to {ratio['high']:.2f}x)"


def _speedups(numbers: Numbers) -> str:
    speedup = numbers["speedup"]
    if same_runtime(numbers["baseline"]["1"], numbers["original"]):
        return _compared(speedup["original"]["1"], "the original, which is also the baseline,")
    ratios = [speedup[name]["1"] for name in ("original", "baseline")]
    alike = len({(_faster(ratio), _slower(ratio)) for ratio in ratios}) == 1
    both = [_compared(ratio, f"the {name}") for ratio, name in zip(ratios, ("original", "baseline"), strict=True)]
    return (" and " if alike else ", but ").join(both)


def _compared(ratio: Mapping[str, float], name: str) -> str:
    if _measurable(ratio):
        return f"{describe_speedup(ratio)} than {name}"
    return f"no measurable difference from {name} {_interval(ratio)}"


def _reasons(numbers: Numbers, evidence: Evidence | None) -> list[str]:
    """At most two, the most certain first."""
    before, after = reference_entry(numbers, "baseline", "1"), numbers["artifact"]
    quantized = after["bit_operations"] < after["macs"] * 32 * 32
    reasons: list[str] = []
    share = _converting_share(evidence)
    if share >= _CONVERSION_SHARE:
        reasons.append(f"{100 * share:.0f} % of its node time is spent on quantization and layout conversion")
    if before["precision"] == "bfloat16":
        reasons.append("the baseline uses the bfloat16 instructions of this CPU")
    if after["macs"] > 0.95 * before["macs"]:
        zeros = ", including those with zeros" if after["sparsity"] > 0.3 else ""
        reasons.append(f"the artifact still computes all {after['macs'] / 1e6:.1f} million MACs{zeros}")
    if quantized and numbers["machine"]["cpu_kind"] == "avx2":
        reasons.append("this CPU has no 8-bit dot-product instructions (VNNI)")
    return reasons[:2]


def _converting_share(evidence: Evidence | None) -> float:
    profile = ((evidence or {}).get("profile") or {}).get("1", {}).get("artifact")
    if not profile or not profile["ms"]:
        return 0.0
    return sum(kind["ms"] for kind in profile["kinds"] if kind["kind"] in _CONVERSIONS) / profile["ms"]


def _recommendation(numbers: Numbers) -> str:
    """Which file to ship if the artifact is not faster than the baseline."""
    sufficient = numbers["original"]["accuracy"] - _LARGEST_ACCURACY_LOSS
    accurate = reference_entry(numbers, "baseline", "1")["accuracy"] >= sufficient
    name: Reference = "baseline" if accurate else "original"
    alternative, artifact = reference_entry(numbers, name, "1"), numbers["artifact"]
    ratio = numbers["speedup"][name]["1"]
    model = f"Ship model.onnx in {RUNTIMES[artifact['runtime']]}"
    if artifact["accuracy"] >= sufficient and _faster(ratio):
        return f"{model}: the baseline loses more than one point of accuracy."
    smaller = artifact["bytes"] * 1.05 < alternative["bytes"]
    if artifact["accuracy"] >= sufficient and not _slower(ratio) and smaller:
        return f"{model} only for its smaller size."
    return f"Ship original.onnx in {RUNTIMES[alternative['runtime']]} ({alternative['precision']}) instead."


def _larger_batches(numbers: Numbers) -> list[str]:
    """The batch sizes at which the artifact is faster than the baseline."""
    faster = [
        f"{describe_speedup(ratio)} than the baseline at batch {size}"
        for size, ratio in numbers["speedup"]["baseline"].items()
        if _faster(ratio)
    ]
    return [f"It is {' and '.join(faster)}."] if faster else []
