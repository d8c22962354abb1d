from __future__ import annotations

import pytest
from samples import (
    alone,
    entry,
    evidence_of,
    numbers_at,
    numbers_of,
    profile_of,
    ratio_of,
    speedups,
    with_errors,
    without_latency,
)

from tersor.cli_output import plain_console, results_tables, show
from tersor.evaluation.results import FileResults, Metric, Results, Speedup
from tersor.report import verdict as module
from tersor.report.verdict import by_batch_size


def verdict(numbers, evidence=None):
    return module.verdict(Results.model_validate(numbers), evidence)


def describe_speedup(ratio, *name):
    return module.describe_speedup(Speedup.model_validate({"n": 5, "groups": 2} | ratio), *name)


def size_change(before, after):
    return module.size_change(*(FileResults.model_validate(entry(1.0) | each) for each in (before, after)))


ERROR = Metric(name="mean absolute error", unit="", higher_is_better=False)
BF16 = {"runtime": "openvino", "precision": "bfloat16"}
OTHER_TARGET = " To compress for OpenVINO, write target: {runtime: openvino} in the recipe."


def test_faster_than_the_original_and_the_baseline():
    assert verdict(numbers_of()) == (
        "4.0x faster (3.8 to 4.2) than the original and 2.0x faster (1.9 to 2.1) than the baseline at batch 1, "
        "4.0x smaller, accuracy 0.4 points lower."
    )


def test_one_ratio_is_given_if_the_original_is_the_baseline():
    assert verdict(alone(1.0)) == (
        "4.0x faster (3.8 to 4.2) than the original at batch 1, 4.0x smaller, accuracy unchanged. "
        "The original is also the baseline."
    )


def test_faster_than_the_original_only():
    assert verdict(numbers_at(3.0, artifact=entry(3.0, size=1_000_000, macs=5_000_000))) == (
        "1.3x faster (1.3 to 1.4) than the original, but 1.5x slower (1.4 to 1.6) than the baseline at batch 1, "
        "4.0x smaller, accuracy unchanged. Possible reasons: the baseline uses the bfloat16 instructions of this CPU. "
        f"Deploy original.onnx in OpenVINO (bfloat16) instead.{OTHER_TARGET}"
    )


def test_slower_than_the_original_and_the_baseline():
    assert verdict(numbers_at(8.0)) == (
        "2.0x slower (1.9 to 2.1) than the original and 4.0x slower (3.8 to 4.2) than the baseline at batch 1, "
        "4.0x smaller, accuracy unchanged. Possible reasons: the baseline uses the bfloat16 instructions of this CPU; "
        "the artifact computes 10.0 million MACs, the baseline 10.0 million. Deploy original.onnx in OpenVINO "
        f"(bfloat16) instead.{OTHER_TARGET}"
    )


def test_no_measurable_difference_from_the_original_or_the_baseline():
    numbers = numbers_at(4.0, speedup=speedups(1.01, 0.98))
    assert verdict(numbers).startswith(
        "no measurable difference from the original (0.96x to 1.06x) and no measurable difference from the baseline "
        "(0.93x to 1.03x) at batch 1, 4.0x smaller"
    )
    assert verdict(numbers).endswith("Deploy model.onnx in ONNX Runtime only if its smaller size matters.")


@pytest.mark.parametrize(
    ("ratio", "expected"),
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
def test_a_speedup_is_given_with_its_interval(ratio, expected):
    assert describe_speedup(ratio) == expected


@pytest.mark.parametrize(
    ("original", "ratio", "expected"),
    [
        (7.43 / 3.53, {"value": 1.5, "low": 1.4, "high": 1.8}, "2.1x (the original, batch 1)"),
        (1 / 2, {"value": 1 / 3, "low": 1 / 3.2, "high": 1 / 2.8}, "2.0x (the original, batch 1)"),
        (1.2, {"value": 1.0, "low": 0.9, "high": 1.1}, "1.20x (the original, batch 1)"),
        (0.9, {"value": 1.5, "low": 1.4, "high": 1.8}, "0.9x (the original, batch 1)"),
        (1.84, {"value": 1.5, "low": 1.4, "high": 1.78}, ""),
    ],
)
def test_medians_whose_ratio_is_outside_the_interval_are_mentioned(original, ratio, expected):
    numbers = alone(1.0, original=entry(original), artifact=entry(1.0))
    for name in ("original", "baseline"):
        numbers["speedup"][name] = {"1": ratio_of(1.0) | ratio, "32": ratio_of(original)}
    results = Results.model_validate(numbers)
    reason = (
        ". It is outside the interval of the speedup, because the speed of the machine changed between rounds. The "
        "speedup compares only times of the same round."
    )
    sentence = f"The median latencies give a ratio of {expected}{reason}" if expected else ""
    assert module.medians_note(results) == sentence
    _, compared = results_tables(results)
    assert compared.caption.endswith(sentence or "at batch 32.")


def test_medians_are_also_compared_with_the_baseline():
    numbers = numbers_of()
    for of in numbers["speedup"].values():
        of["32"] = ratio_of(1.5)
    sentence = module.medians_note(Results.model_validate(numbers))
    ratios = "4.0x (the original, batch 32) and 2.0x (the baseline, batch 32)"
    assert sentence.startswith(f"The median latencies give ratios of {ratios}. They are outside the intervals ")


def test_the_baseline_depends_on_the_batch_size():
    numbers = numbers_of()
    numbers["baseline"]["32"] = {"runtime": "onnxruntime", "precision": "float32"}
    results = Results.model_validate(numbers)
    assert module.reference_entry(results, "baseline", "1") == results.candidates["openvino"]
    assert module.reference_entry(results, "baseline", "32") == results.candidates["onnxruntime"]
    assert module.reference_entry(results, "original", "32") == results.original


def test_quantization_and_layout_conversion_in_the_profile_are_a_reason():
    profile = {"artifact": profile_of(("QLinearConv", 1.0), ("QuantizeLinear", 0.6), ("ReorderInput", 0.4))}
    expected = verdict(alone(8.0), evidence_of(profile={"1": profile}))
    assert (
        "Possible reasons: 50 % of the time in the artifact's operators is spent on quantization and layout conversion"
        in expected
    )
    few = {"artifact": profile_of(("QLinearConv", 9.0), ("QuantizeLinear", 1.0))}
    assert "layout conversion" not in verdict(alone(8.0), evidence_of(profile={"1": few}))


def test_masked_weights_are_a_reason():
    artifact = entry(8.0) | {"sparsity": 0.9}
    assert "10.0 million MACs (including those with zeros), the baseline 10.0 million" in verdict(
        alone(8.0, artifact=artifact)
    )


@pytest.mark.parametrize(("kind", "bits", "expected"), [("avx2", 8, True), ("vnni", 8, False), ("avx2", 32, False)])
def test_a_cpu_without_vnni_is_a_reason(kind, bits, expected):
    numbers = alone(8.0, artifact=entry(8.0, bits=bits, macs=5_000_000))
    numbers["machine"]["cpu_kind"] = kind
    assert ("(VNNI)" in verdict(numbers)) is expected


def test_no_reason_is_given_if_none_is_known():
    expected = verdict(alone(8.0, artifact=entry(8.0, macs=5_000_000)))
    assert "reasons" not in expected
    assert expected.endswith("Deploy original.onnx in ONNX Runtime (float32) instead.")


def test_equally_fast_and_not_smaller_is_not_recommended():
    expected = verdict(alone(4.0, artifact=entry(4.0)))
    assert "Deploy original.onnx in ONNX Runtime (float32) instead." in expected


def test_equally_fast_and_smaller_but_inaccurate_is_not_recommended():
    expected = verdict(alone(4.0, artifact=entry(4.0, score=88.9, size=1_000_000)))
    assert "Deploy original.onnx in ONNX Runtime (float32) instead." in expected


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (8.0, "Deploy original.onnx in ONNX Runtime (float32) instead."),
        (
            3.0,
            (
                "Deploy model.onnx in ONNX Runtime: the accuracy of the baseline is more than one point worse than "
                "that of the original."
            ),
        ),
    ],
)
def test_a_baseline_that_loses_more_than_a_point_is_not_recommended(ms, expected):
    candidates = {"onnxruntime": entry(4.0), "openvino": entry(1.0, score=88.9, **BF16)}
    assert verdict(numbers_at(ms, candidates=candidates, speedup=speedups(4 / ms, 1 / ms))).endswith(
        expected + OTHER_TARGET
    )


def test_larger_batches_are_listed_if_slower():
    numbers = numbers_at(1.0)
    assert verdict(numbers).startswith("4.0x faster")
    assert "than the baseline at batch 32" not in verdict(numbers)
    numbers["speedup"]["baseline"]["32"] = ratio_of(0.4)
    sentence = " The artifact is 2.5x slower (2.4 to 2.6) than the baseline at batch 32."
    assert verdict(numbers).endswith(sentence + OTHER_TARGET)


def test_larger_batches_are_listed_if_faster():
    numbers = numbers_at(8.0)
    numbers["speedup"]["baseline"]["32"] = ratio_of(4.0)
    sentence = " The artifact is 4.0x faster (3.8 to 4.2) than the baseline at batch 32."
    assert verdict(numbers).endswith(sentence + OTHER_TARGET)


def test_compressing_for_the_runtime_of_the_baseline_is_suggested_only_if_it_helps():
    assert OTHER_TARGET not in verdict(alone(8.0))
    assert OTHER_TARGET not in verdict(numbers_at(4.0, speedup=speedups(1.01, 0.98)))


@pytest.mark.parametrize(
    ("expected", "line"),
    [({"1": "a", "32": "a"}, "a"), ({"1": "a", "32": "b", "128": "b"}, "a at batch 1, b at batch 32 and 128")],
)
def test_batch_sizes_with_the_same_text_are_grouped(expected, line):
    assert by_batch_size(expected) == line


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(400, 100, "4.0x smaller"), (100, 150, "1.5x larger"), (100, 97, "same size")],
)
def test_changes_of_the_size_are_described(before, after, expected):
    assert size_change({"bytes": before}, {"bytes": after}) == expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (89.6, "accuracy 0.4 points lower"),
        (90.62, "accuracy 0.6 points higher"),
        (89.96, "accuracy 0.04 points lower"),
        (90.0, "accuracy unchanged"),
    ],
)
def test_changes_of_the_accuracy_are_given_in_points(after, expected):
    assert Metric(name="accuracy", unit="%", higher_is_better=True).change(90.0, after) == expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [(0.12, "mean absolute error 0.02 higher"), (0.08, "mean absolute error 0.02 lower")],
)
def test_changes_of_a_metric_without_a_unit_are_not_given_in_points(after, expected):
    assert ERROR.change(0.1, after) == expected
    assert ERROR.change(0.1, 0.10001) == "mean absolute error unchanged"


@pytest.mark.parametrize(("score", "file"), [(0.1005, "model.onnx"), (0.09, "model.onnx"), (0.105, "original.onnx")])
def test_a_larger_error_is_not_recommended(score, file):
    numbers = alone(4.0, artifact=entry(4.0, score=score, size=1_000_000), original=entry(4.0, score=0.1))
    numbers |= {"candidates": {"onnxruntime": entry(4.0, score=0.1)}, "metric": ERROR.model_dump()}
    assert f"Deploy {file}" in verdict(numbers)


def test_the_table_contains_the_share_of_zero_weights_only_if_there_are_any():
    numbers = numbers_of()
    table, _ = results_tables(Results.model_validate(numbers))
    assert "zero weights, %" not in [*table.columns[0].cells]
    numbers["artifact"]["sparsity"] = 0.7004
    table, _ = results_tables(Results.model_validate(numbers))
    place = [*table.columns[0].cells].index("zero weights, %")
    assert [[*column.cells][place] for column in table.columns] == ["zero weights, %", "0.0", "0.0", "70.0"]


def test_the_table_contains_the_number_of_threads_and_the_precision():
    numbers = numbers_of()
    numbers["machine"]["threads"] = 1
    numbers["artifact"]["precision"] = "int8, rest float32"
    table, _ = results_tables(Results.model_validate(numbers))
    assert table.title == "Some CPU, 1 thread"
    place = [*table.columns[0].cells].index("precision")
    assert [[*column.cells][place] for column in table.columns][-1] == "int8, rest float32"


def test_the_tables_fit_into_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    numbers = numbers_of()
    numbers["artifact"]["precision"] = "int4 and int8, rest float32"
    for ratios in numbers["speedup"].values():
        ratios["1"] |= {"value": 1.0, "low": 0.987, "high": 1.012}
    numbers["metric"] |= {"name": "a_metric_with_a_long_name_of_your_own"}
    results = Results.model_validate(numbers)
    show(plain_console(), *results_tables(results))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    labels = "".join(line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│"))
    assert "a_metric_with_a_long_name_of_your_own" in labels
    for size, latency in results.artifact.latency_ms.items():
        assert f"{latency.median:.2f}" in printed
        assert f"batch {size} " in printed
    assert "(0.99x to 1.01x)" in printed


def test_the_table_contains_the_standard_error_of_each_accuracy():
    table, _ = results_tables(Results.model_validate(with_errors()))
    place = [*table.columns[0].cells].index("accuracy, %")
    cells = [[*column.cells][place] for column in table.columns]
    assert cells == ["accuracy, %", "90.00 ± 0.95", "89.90 ± 0.95", "89.60 ± 0.95"]
    assert table.caption == (
        "± is one standard error on 1,000 test images. The difference from the original (-0.40 ± 0.35 points, from the "
        "same images) is less than two standard errors, so it may be chance."
    )
    table, _ = results_tables(Results.model_validate(with_errors(0.2)))
    assert table.caption.endswith("is two standard errors or more, so it is unlikely to be chance.")
    table, _ = results_tables(Results.model_validate(numbers_of()))
    assert table.caption is None


def test_the_verdict_contains_the_standard_error_of_the_difference():
    assert verdict(with_errors()).endswith("4.0x smaller, accuracy 0.4 points lower (standard error 0.35).")


def test_without_latency_no_speedup_is_claimed():
    numbers = without_latency()
    assert verdict(numbers) == "4.0x smaller, accuracy 0.4 points lower. Latency was not measured."
    table, compared = results_tables(Results.model_validate(numbers))
    assert not [cell for cell in table.columns[0].cells if str(cell).startswith("ms")]
    assert compared.title == "artifact, compared with the original"
    assert [[*column.cells] for column in compared.columns] == [
        ["MB", "million MACs", "billion bit operations"],
        ["4.00x lower", "2.00x lower", "32.00x lower"],
    ]
    assert compared.caption == (
        "Latency was not measured, so no speedup is shown. To measure it, run tersor bench on this folder."
    )
