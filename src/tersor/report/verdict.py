"""The first line of the report: the artifact against the original and the baseline, and which file to ship."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, Protocol

from tersor.evaluation.results import Execution, FileResults, Reference, Results, Speedup
from tersor.evaluation.timings import Ratio

Evidence = Mapping[str, Any]

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

_LARGEST_LOSS = 1.0
"""Percentage points, or percent of a metric without a unit; a file that loses more is not recommended."""
_CONVERSION_SHARE = 0.2
"""Share of the node time from which conversions are named as a reason."""
_CONVERSIONS = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize", "Cast", "Convert"),
    *("Reorder", "ReorderInput", "ReorderOutput", "Transpose"),
}


class _Sized(Protocol):
    @property
    def bytes(self) -> int: ...


def verdict(numbers: Results, evidence: Evidence | None = None) -> str:
    """Latency at batch 1 against the original and the baseline, if measured; size and metric against the original.

    Batch sizes whose result differs from that at batch 1 are named, too. If the artifact is not faster than the
    baseline at batch 1, the text also has possible reasons and the file to deploy: the fastest at batch 1 that loses at
    most one point of the metric.

    Args:
        numbers: the content of `numbers.json`.
        evidence: the content of `evidence.json`, whose node profile may give a reason.
    """
    before, after = numbers.original, numbers.artifact
    change = f"{size_change(before, after)}, {numbers.metric.change(before.score, after.score)}{_error(after)}"
    if not numbers.latency_measured:
        return f"{change}. Latency was not measured."
    sentences = [f"{_speedups(numbers)} at batch 1, {change}."]
    sentences += ["The original is also the baseline."] if _original_is_baseline(numbers) else []
    speedups = numbers.speedup["baseline"]
    if _direction(speedups["1"]) <= 0:
        reasons = _reasons(numbers, evidence)
        sentences += [f"Possible reasons: {'; '.join(reasons)}."] if reasons else []
        sentences.append(_recommendation(numbers))
    differing = [
        f"{describe_speedup(ratio)} than the baseline at batch {size}"
        for size, ratio in speedups.items()
        if _direction(ratio) not in {0, _direction(speedups["1"])}
    ]
    sentences += [f"The artifact is {' and '.join(differing)}."] if differing else []
    return " ".join([*sentences, *_other_target(numbers)])


def _other_target(numbers: Results) -> list[str]:
    """How to compress for the runtime of a baseline that is faster than the artifact."""
    runtimes = {
        numbers.baseline[size].runtime
        for size, ratio in numbers.speedup["baseline"].items()
        if _direction(ratio) < 0 and numbers.baseline[size].runtime != numbers.artifact.runtime
    }
    return [
        f"To compress for {RUNTIMES[each]}, write target: {{runtime: {each}}} in the recipe."
        for each in sorted(runtimes)
    ]


def _error(after: FileResults) -> str:
    return "" if after.difference_error is None else f" (standard error {after.difference_error:.2f})"


def scores_note(numbers: Results) -> str:
    """What the standard errors of the table say about the difference from the original; empty without them."""
    error, difference = numbers.artifact.difference_error, numbers.artifact.score - numbers.original.score
    if error is None:
        return ""
    meaning = (
        "less than two standard errors, so it may be chance"
        if abs(difference) < 2 * error
        else "two standard errors or more, so it is unlikely to be chance"
    )
    return (
        f"± is one standard error on {numbers.test_images:,} test images. The difference from the original "
        f"({difference:+.2f} ± {error:.2f} points, from the same images) is {meaning}."
    )


def describe_speedup(ratio: Speedup | Ratio, name: str = "") -> str:
    """A speedup with its 95 % confidence interval and, if given, the `name` of what it is compared with.

    "2.4x faster (2.1 to 2.7)", or "no measurable difference (0.97x to 1.02x)" if the interval contains 1.
    """
    value, low, high = ratio.value, ratio.low, ratio.high
    if not _direction(ratio):
        return f"no measurable difference{name and f' from {name}'} ({low:.2f}x to {high:.2f}x)"
    if value < 1:
        value, low, high = 1 / value, 1 / high, 1 / low
    digits = _digits(low, high)
    word = "faster" if _direction(ratio) > 0 else "slower"
    return f"{value:.{digits}f}x {word} ({low:.{digits}f} to {high:.{digits}f}){name and f' than {name}'}"


def _digits(low: float, high: float) -> int:
    """Digits after the point of a ratio above 1."""
    fewest = 1 if round(low, 1) < round(high, 1) else 2
    return next((digits for digits in (fewest, 2, 3) if round(low, digits) > 1), 4)


def medians_note(numbers: Results) -> str:
    """A note if the ratio of the printed medians is outside the printed interval of the speedup; else empty."""
    outside: list[str] = []
    for name, size in product(numbers.speedup, numbers.baseline):
        if name == "baseline" and same_runtime(numbers.baseline[size], numbers.original):
            continue
        before, after = reference_entry(numbers, name, size).latency_ms[size], numbers.artifact.latency_ms[size]
        ratio = _outside(numbers.speedup[name][size], before.median / after.median)
        outside += [f"{ratio} (the {name}, batch {size})"] if ratio else []
    if not outside:
        return ""
    one = len(outside) == 1
    ratios = f"{'a ratio' if one else 'ratios'} of {' and '.join(outside)}"
    where = "It is outside the interval of the speedup" if one else "They are outside the intervals of the speedups"
    return (
        f"The median latencies give {ratios}. {where}, because the speed of the machine changed between "
        "rounds. The speedup compares only times of the same round."
    )


def _outside(speedup: Speedup, ratio: float) -> str:
    """The ratio of two medians if it is not in the interval of the speedup, all as `describe_speedup` rounds them."""
    low, high, digits = speedup.low, speedup.high, 2
    if direction := _direction(speedup):
        if direction < 0:
            low, high, ratio = 1 / high, 1 / low, 1 / ratio
        digits = _digits(low, high)
    inside = round(low, digits) <= round(ratio, digits) <= round(high, digits)
    return "" if inside else f"{ratio:.{digits}f}x"


def _direction(ratio: Speedup | Ratio) -> int:
    """1 for faster, -1 for slower, 0 if the confidence interval contains 1."""
    return (ratio.low > 1) - (ratio.high < 1)


def reference_entry(numbers: Results, name: Reference, size: str) -> FileResults:
    """What was measured for the original or the baseline at a batch size."""
    if name == "original":
        return numbers.original
    return numbers.candidates[numbers.baseline[size].runtime]


def runtime_of(entry: Execution) -> str:
    """ "OpenVINO in bfloat16"."""
    return f"{RUNTIMES[entry.runtime]} in {entry.precision}"


def by_batch_size(texts: Mapping[str, str]) -> str:
    """Batch size -> text, in one line: "a at batch 1, b at batch 32 and 128"; only the text if all are the same."""
    sizes: dict[str, list[str]] = {}
    for size, text in texts.items():
        sizes.setdefault(text, []).append(size)
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{text} at batch {' and '.join(each)}" for text, each in sizes.items())


def same_runtime(one: Execution, other: Execution) -> bool:
    """Whether two entries have the same runtime and precision."""
    return (one.runtime, one.precision) == (other.runtime, other.precision)


def size_change(before: _Sized, after: _Sized, times: str = "x") -> str:
    """ "4.2x smaller"; a difference below 5 % is "same size". `times` follows the ratio."""
    ratio = before.bytes / after.bytes
    if 1 / 1.05 < ratio < 1.05:
        return "same size"
    return f"{ratio:.1f}{times} smaller" if ratio > 1 else f"{1 / ratio:.1f}{times} larger"


def _original_is_baseline(numbers: Results) -> bool:
    return same_runtime(numbers.baseline["1"], numbers.original)


def _speedups(numbers: Results) -> str:
    original, baseline = (numbers.speedup[name]["1"] for name in ("original", "baseline"))
    if _original_is_baseline(numbers):
        return describe_speedup(original, "the original")
    both = describe_speedup(original, "the original"), describe_speedup(baseline, "the baseline")
    return (" and " if _direction(original) == _direction(baseline) else ", but ").join(both)


def _reasons(numbers: Results, evidence: Evidence | None) -> list[str]:
    """At most two, the most certain first."""
    before, after = reference_entry(numbers, "baseline", "1"), numbers.artifact
    quantized = after.bit_operations < after.macs * 32 * 32
    reasons: list[str] = []
    profile = ((evidence or {}).get("profile") or {}).get("1", {}).get("artifact")
    if profile and profile["ms"]:
        share = sum(kind["ms"] for kind in profile["kinds"] if kind["kind"] in _CONVERSIONS) / profile["ms"]
        if share >= _CONVERSION_SHARE:
            reasons.append(
                f"{100 * share:.0f} % of the time in the artifact's operators is spent on quantization and layout "
                "conversion"
            )
    if before.precision == "bfloat16":
        reasons.append("the baseline uses the bfloat16 instructions of this CPU")
    if after.macs > 0.95 * before.macs:
        zeros = " (including those with zeros)" if after.sparsity > 0.3 else ""
        million = f"{after.macs / 1e6:.1f} million MACs{zeros}"
        reasons.append(f"the artifact computes {million}, the baseline {before.macs / 1e6:.1f} million")
    if quantized and numbers.machine.cpu_kind == "avx2":
        reasons.append("this CPU has no 8-bit dot-product instructions (VNNI)")
    return reasons[:2]


def _recommendation(numbers: Results) -> str:
    """Which file to deploy if the artifact is not faster than the baseline."""
    metric, before = numbers.metric, numbers.original.score
    largest = _LARGEST_LOSS if metric.unit else _LARGEST_LOSS / 100 * abs(before)
    sufficient = lambda entry: metric.loss(before, entry.score) <= largest  # noqa: E731
    name: Reference = "baseline" if sufficient(reference_entry(numbers, "baseline", "1")) else "original"
    alternative, artifact = reference_entry(numbers, name, "1"), numbers.artifact
    direction = _direction(numbers.speedup[name]["1"])
    if sufficient(artifact):
        model = f"Deploy model.onnx in {RUNTIMES[artifact.runtime]}"
        if direction > 0:
            much = "point" if metric.unit else "percent"
            worse = f"more than one {much} worse than that of the original"
            return f"{model}: the {metric.name} of the baseline is {worse}."
        if direction == 0 and artifact.bytes * 1.05 < alternative.bytes:
            return f"{model} only if its smaller size matters."
    return f"Deploy original.onnx in {RUNTIMES[alternative.runtime]} ({alternative.precision}) instead."
