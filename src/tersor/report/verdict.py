"""The first line of the report: how the artifact compares with the original and with the fastest that costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Reference = Literal["original", "baseline"]
Numbers = Mapping[str, Any]

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

_MOST_POINTS_LOST = 1.0
_TELLING_SHARE = 0.2
_CONVERSIONS = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize", "Cast", "Convert"),
    *("Reorder", "ReorderInput", "ReorderOutput", "Transpose"),
}


def verdict(numbers: Numbers, evidence: Mapping[str, Any] | None = None) -> str:
    """Speed at batch 1 against the original and the baseline, size and points against the original.

    Where the artifact is not faster than the baseline: why that may be, and what to ship, which is the fastest at batch
    1 that loses at most one point.

    Args:
        numbers: `numbers.json`.
        evidence: `evidence.json`, whose node profile may say why.
    """
    before, after = numbers["original"], numbers["artifact"]
    change = f"{size_change(before, after)}, {points_change(before['accuracy'], after['accuracy'])}"
    lines = [f"{_speed(numbers)} at batch 1, {change}."]
    if not _faster(numbers["speedup"]["baseline"]["1"]):
        reasons = _reasons(numbers, evidence)
        lines += [f"Possible reasons: {'; '.join(reasons)}."] if reasons else []
        lines += [_advice(numbers), *_elsewhere(numbers)]
    return " ".join(lines)


def difference(ratio: Mapping[str, float]) -> str:
    """ "2.4x faster (2.1 to 2.7)", with the 95 % interval; "no measurable difference (0.97x to 1.02x)" around 1."""
    if not _measurable(ratio):
        return f"no measurable difference {_around_one(ratio)}"
    value, low, high = ratio["value"], ratio["low"], ratio["high"]
    if value < 1:
        value, low, high = 1 / value, 1 / high, 1 / low
    fewest = 1 if round(low, 1) < round(high, 1) else 2
    digits = next((digits for digits in (fewest, 2, 3) if round(low, digits) > 1), 4)
    word = "faster" if _faster(ratio) else "slower"
    return f"{value:.{digits}f}x {word} ({low:.{digits}f} to {high:.{digits}f})"


def reference(numbers: Numbers, name: Reference, size: str) -> Mapping[str, Any]:
    """What the artifact is compared with at a batch size."""
    if name == "original":
        return numbers["original"]
    return numbers["candidates"][numbers["baseline"][size]["runtime"]]


def place(entry: Mapping[str, Any]) -> str:
    """ "OpenVINO in bfloat16"."""
    return f"{RUNTIMES[entry['runtime']]} in {entry['precision']}"


def by_batch_size(told: Mapping[str, str]) -> str:
    """Batch size -> text, in one line: "a at batch 1, b at batch 32 and 128"; the text alone where all are the same."""
    sizes: dict[str, list[str]] = {}
    for size, text in told.items():
        sizes.setdefault(text, []).append(size)
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{text} at batch {' and '.join(each)}" for text, each in sizes.items())


def same_place(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries are of the same runtime and precision."""
    return (one["runtime"], one["precision"]) == (other["runtime"], other["precision"])


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


def _measurable(ratio: Mapping[str, float]) -> bool:
    return not ratio["low"] <= 1 <= ratio["high"]


def _faster(ratio: Mapping[str, float]) -> bool:
    return ratio["low"] > 1


def _slower(ratio: Mapping[str, float]) -> bool:
    return ratio["high"] < 1


def _around_one(ratio: Mapping[str, float]) -> str:
    return f"({ratio['low']:.2f}x to {ratio['high']:.2f}x)"


def _speed(numbers: Numbers) -> str:
    speedup = numbers["speedup"]
    if same_place(numbers["baseline"]["1"], numbers["original"]):
        return _than(speedup["original"]["1"], "the original, which is also the baseline,")
    ratios = [speedup[name]["1"] for name in ("original", "baseline")]
    alike = len({(_faster(ratio), _slower(ratio)) for ratio in ratios}) == 1
    both = [_than(ratio, f"the {name}") for ratio, name in zip(ratios, ("original", "baseline"), strict=True)]
    return (" and " if alike else ", but ").join(both)


def _than(ratio: Mapping[str, float], name: str) -> str:
    if _measurable(ratio):
        return f"{difference(ratio)} than {name}"
    return f"no measurable difference from {name} {_around_one(ratio)}"


def _reasons(numbers: Numbers, evidence: Mapping[str, Any] | None) -> list[str]:
    """At most two, the most certain first."""
    before, after = reference(numbers, "baseline", "1"), numbers["artifact"]
    quantized = after["bit_operations"] < after["macs"] * 32 * 32
    reasons: list[str] = []
    share = _converting_share(evidence)
    if share >= _TELLING_SHARE:
        reasons.append(f"{100 * share:.0f} % of its node time is spent on quantizing and on converting between layouts")
    if before["precision"] == "bfloat16":
        reasons.append("the baseline uses the bfloat16 units of this CPU")
    if after["macs"] > 0.95 * before["macs"]:
        masked = ", zeros included" if after["sparsity"] > 0.3 else ""
        reasons.append(f"the artifact still does all {after['macs'] / 1e6:.1f} million multiplications{masked}")
    if quantized and numbers["machine"]["cpu_kind"] == "avx2":
        reasons.append("this CPU has no instructions that add 8-bit products in 32 bits (VNNI)")
    return reasons[:2]


def _converting_share(evidence: Mapping[str, Any] | None) -> float:
    profile = ((evidence or {}).get("profile") or {}).get("1", {}).get("artifact")
    if not profile or not profile["ms"]:
        return 0.0
    return sum(kind["ms"] for kind in profile["kinds"] if kind["kind"] in _CONVERSIONS) / profile["ms"]


def _advice(numbers: Numbers) -> str:
    """What to ship where the artifact is not faster than the baseline."""
    enough = numbers["original"]["accuracy"] - _MOST_POINTS_LOST
    accurate = reference(numbers, "baseline", "1")["accuracy"] >= enough
    name: Reference = "baseline" if accurate else "original"
    initial_model, artifact = reference(numbers, name, "1"), numbers["artifact"]
    ratio = numbers["speedup"][name]["1"]
    model = f"Ship model.onnx in {RUNTIMES[artifact['runtime']]}"
    if artifact["accuracy"] >= enough and _faster(ratio):
        return f"{model}: the baseline loses more than one point."
    smaller = artifact["bytes"] * 1.05 < initial_model["bytes"]
    if artifact["accuracy"] >= enough and not _slower(ratio) and smaller:
        return f"{model} for its size alone."
    return f"Ship original.onnx in {RUNTIMES[initial_model['runtime']]} ({initial_model['precision']}) instead."


def _elsewhere(numbers: Numbers) -> list[str]:
    """At which batch sizes it is faster than the baseline."""
    found = [
        f"{difference(ratio)} than the baseline at batch {size}"
        for size, ratio in numbers["speedup"]["baseline"].items()
        if _faster(ratio)
    ]
    return [f"It is {' and '.join(found)}."] if found else []
