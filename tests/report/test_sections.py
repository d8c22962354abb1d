"""The values in the sections of the report, compared with values computed by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from samples import alone, evidence_of, numbers_of, profile_of

from tersor.evaluation.metric import Metric
from tersor.evaluation.results import Peak, Results
from tersor.report import layers_section, predictions_section, summary, training_section
from tersor.report.charts import (
    grouped,
    histogram_span,
    largest_value,
    line_points,
    opacities,
    share,
)


def results(made=None):
    return Results.model_validate(made or numbers_of())


def test_losses_and_metrics_of_a_users_method_are_listed():
    made = numbers_of()
    made["stages"][0] |= {"losses": {"labels": 0.5, "penalty": 0.0123}, "noised": 185, "kind": "gauss", "masks": []}
    found = Results.model_validate(made)
    (line, *_) = (each for each in summary.stage_values(found) if "penalty" in each)
    assert line == (
        f"{found.stages[0].name}: losses, mean of the last epoch: labels 0.500, penalty 0.0123; "
        "metrics of its methods: noised 185, kind gauss"
    )
    made["stages"] = [{**stage, "losses": {}} for stage in made["stages"][1:]]
    assert not any("losses" in each for each in summary.stage_values(Results.model_validate(made)))


def test_the_artifact_is_compared_with_the_original_and_the_baseline():
    assert summary.references(results()) == ["original", "baseline"]
    assert summary.references(results(alone(1.0))) == ["original"]
    mixed = alone(1.0)
    mixed["baseline"]["32"] = {"runtime": "openvino", "precision": "bfloat16"}
    mixed["candidates"] = numbers_of()["candidates"]
    assert summary.references(results(mixed)) == ["original", "baseline"]
    assert summary.describe_baseline(results()) == (
        "original.onnx in the fastest of ONNX Runtime and OpenVINO at their default precision: OpenVINO in bfloat16"
    )
    assert summary.describe_baseline(results(alone(1.0))) == (
        "original.onnx in ONNX Runtime at its default precision: ONNX Runtime in float32"
    )
    titles = summary.entries(results())
    assert list(titles) == ["original", "OpenVINO", "artifact"]
    assert summary.colours(results()) == {"original": "original", "OpenVINO": "baseline", "artifact": "artifact"}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0, 5, ""),
        (5, 0, ""),
        (100, 100.4, "unchanged"),
        (100, 99.6, "unchanged"),
        (100, 101, "1.01x higher"),
        (3.82, 1, "3.82x lower"),
        (1, 4, "4.00x higher"),
    ],
)
def test_reductions_are_described_in_words(before, after, words):
    assert summary.describe_reduction(before, after) == words


def test_methods_are_described_as_in_a_recipe():
    methods = ["ptq", {"soft_targets": {"temperature": 4, "loss_weight": 1}}, {"fitnet": None}]
    assert summary.describe_methods(methods) == "ptq, soft_targets (temperature 4, loss_weight 1), fitnet"


def test_each_stage_has_the_last_known_values_of_earlier_stages():
    found = list(summary.stages(results()))
    assert [stage["name"] for stage, _ in found] == ["original", "distil", "draw", "mask", "quantize"]
    assert found[0][1] == {}
    assert found[1][1]["score"] == 90.0
    assert found[2][1]["score"] == 90.2
    assert "score" not in found[2][0]
    assert found[4][1]["score"] == 90.2
    assert found[4][1]["macs"] == 10_000_000


def test_every_run_is_drawn_and_the_axis_covers_most_of_them():
    runs, end = summary.latency_runs(results(), "1")
    assert runs["artifact"] == pytest.approx([0.99, 1.0, 1.01, 1.02, 1.0])
    assert end == pytest.approx(1.15 * np.percentile([4 * each for each in (0.99, 1.0, 1.01, 1.02, 1.0)], 95))


def test_the_share_of_the_peak_throughput_matches_values_computed_by_hand():
    peaks = [
        {"runtime": "onnxruntime", "precision": "float32", "macs_per_second": 1e10, "median": 0.9e10, "n": 9},
        {"runtime": "openvino", "precision": "bfloat16", "macs_per_second": 4e10, "median": 3.2e10, "n": 9},
    ]
    made = results(numbers_of(peaks=peaks))
    shares = summary.peak_shares(made)
    # 10 million MACs in 4 ms are 2.5 billion in a second
    assert shares["original"]["1"] == pytest.approx((2.5, 0.25))
    assert shares["original"]["32"] == pytest.approx((80.0, 8.0))
    assert shares["OpenVINO"]["1"] == pytest.approx((5.0, 0.125))
    assert summary.peak_noise([Peak.model_validate(each) for each in peaks]) == pytest.approx(0.8)


def test_curves_are_drawn_for_stages_with_masks_or_validations():
    (made,) = training_section.curves(results())
    assert (made.name, made.steps) == ("mask", 40)
    assert made.masks == [
        {"sparsity": [(10, 0.5), (20, 0.7), (30, 0.8)], "changed": [(10, 0.5), (20, 0.25), (30, 0.125)]}
    ]
    assert made.scores == [(20, 60.0), (40, 80.0)]
    accuracy = Metric(name="accuracy", unit="%", higher_is_better=True)
    scores = [(step, float(step)) for step in range(7)]
    assert training_section.describe_spread(accuracy, scores[:4]) == ""
    words = training_section.describe_spread(accuracy, scores)
    assert words.startswith("last 5 of 7 validations: mean 4.00")
    assert words.endswith(f"standard deviation {np.std([2, 3, 4, 5, 6], ddof=1):.2f}")


def test_movement_towards_a_grid_is_summarized():
    histogram = training_section.position_histogram({"before": [1, 2, 3, 4], "after": [4, 3, 2, 1]})
    assert (histogram["low"], histogram["width"], histogram["after_width"]) == (-0.5, 0.25, 0.25)
    assert training_section.movement_groups([0.1, None], to_grid=True) == [
        ("initial distance 0.00 to 0.25 steps; mean movement", 0.1),
        ("initial distance 0.25 to 0.50 steps; mean movement", None)
    ]  # fmt: skip
    moved = [None, 0.125, 0.25, None]
    words = training_section.describe_movement(moved, to_grid=True)
    assert words == "weights closest to a grid point moved by 0.125 steps, the farthest by 0.250"
    words = training_section.describe_movement(moved, to_grid=False)
    assert words == "weights closest to zero moved by 0.125, the farthest by 0.250"


def test_the_slowest_operators_are_listed_and_the_others_summed():
    profile = profile_of(*((f"op{number}", float(20 - number)) for number in range(9)), ("tiny", 0.1))
    rows = list(layers_section.operator_times(profile))
    assert [row[:3] for row in rows[:2]] == [("op0", 2, 20.0), ("op1", 2, 19.0)]
    assert len(rows) == 8
    assert rows[7][:2] == ("3 others", 6)
    assert rows[7][2] == pytest.approx(13.0 + 12.0 + 0.1)
    assert rows[0][3] == f"{100 * 20 / profile['ms']:.0f} %"
    few = list(layers_section.operator_times(profile_of(("a", 199.0), ("b", 1.0), ("c", 2.1))))
    assert [row[3] for row in few] == ["98 %", "<1 %", "1 %"]


def test_layers_are_listed_by_time_error_sparsity_and_bits():
    evidence = evidence_of()
    layers = evidence["layers"]
    times = layers_section.layer_times(layers, evidence["profile"]["1"], "original")
    assert times == [("conv", {"original": 3.0, "artifact": 0.9}), ("linear", {"artifact": 0.0})]
    assert layers_section.output_errors(layers) == [("conv", 20.0), ("linear", None)]
    assert layers_section.sparsity(layers) == [
        ("conv", {"masked": 25.0, "zeros": 50.0}), ("linear", {"masked": 25.0, "zeros": 50.0})
    ]  # fmt: skip
    assert layers_section.sparsity([layer | {"masked": 0.0} for layer in layers])[0] == ("conv", {"zeros": 50.0})
    assert layers_section.sparsity([layers[0], layers[1] | {"masked": 0.0}])[1] == (
        "linear",
        {"masked": 0.0, "zeros": 50.0},
    )
    assert layers_section.narrowed(evidence["widths"]) == 1
    groups = layers_section.bit_groups([layers[0], layers[1], layers[0] | {"activation_bits": 4}])
    assert [bits for bits, _ in groups] == [(32, 32), (2, 8), (2, 4)]
    assert [[layer["name"] for layer in each] for _, each in groups] == [["linear"], ["conv"], ["conv"]]
    for bits in (-1, 33):
        with pytest.raises(ValueError, match="a weight of"):
            layers_section.bit_groups([layers[0] | {"weight_bits": bits}])
    layers_section.bit_groups([layers[0] | {"weight_bits": 0}])


def test_weights_and_fractions_are_described_in_words():
    conv, linear = evidence_of()["layers"]
    assert layers_section.describe_weights(conv) == "step 0.100 to 0.300, grid −1 to 1, 3 levels, 3 zeros"
    conv["histogram"]["step"] = [0.2, 0.2, 0.2]
    assert layers_section.describe_weights(conv | {"zeros": 1234}) == "step 0.200, grid −1 to 1, 3 levels, 1,234 zeros"
    assert layers_section.describe_weights(linear) == "float, 3 zeros"
    fractions = [layers_section.describe_fraction(each) for each in (None, 0.0, 5e-5, 1e-4, 0.25)]
    assert fractions[:1] + fractions[2:3] == ["–", "<0.01"]
    assert [float(each) for each in (fractions[1], *fractions[3:])] == [0.0, 0.01, 25.0]


def test_classes_are_described_by_name_likelihood_and_similarity():
    numbers = SimpleNamespace(classes=["cat", "dog"])
    assert [predictions_section.class_name(numbers, index) for index in (None, 1, 2)] == ["", "dog", "class 2"]
    assert predictions_section.likeliest([0.1, 0.5, 0.05, 0.35], ["a", "b", "c", "d"]) == "b 0.500, d 0.350, a 0.100"
    rows, largest = predictions_section.similarity_rows(numbers, [[0, [0.6, 0.3, 0.1]], [1, [0.4, 0.6, 0.0]]])
    assert rows == [
        ("cat", [("60.0", 0), ("30.0", 3), ("10.0", 1)]),
        ("dog", [("40.0", 4), ("60.0", 0), ("0.0", 0)]),
    ]
    assert largest == "dog as cat, cat as dog, cat as class 2"
    assert predictions_section.similarity_rows(numbers, [[0, [1.0, 0.0]]])[0] == [("cat", [("100.0", 0), ("0.0", 0)])]


def test_changed_predictions_are_grouped_by_kind_and_class():
    numbers = SimpleNamespace(classes=["cat", "dog", "cow"])
    kinds = [{"before": 0, "after": 1, "label": label} for label in (0, 1, 2)]
    assert [predictions_section.change_of(each) for each in kinds] == ["lost", "gained", "other"]
    names, rows = predictions_section.change_rows(numbers, [[0, 1, 1200], [2, 0, 300]])
    assert names == ["cat", "dog", "cow"]
    assert rows == [
        ("cat", [("·", 0), ("1,200", 4), ("·", 0)]),
        ("dog", [("·", 0), ("·", 0), ("·", 0)]),
        ("cow", [("300", 1), ("·", 0), ("·", 0)]),
    ]
    assert predictions_section.change_rows(numbers, [[0, number, 1] for number in range(1, 20)]) is not None
    assert predictions_section.change_rows(numbers, [[0, number, 1] for number in range(1, 21)]) is None


def test_of_many_classes_those_with_the_largest_drops_and_gains_are_listed():
    classes = [{"class": n, "images": 10 * (1 + n % 2), "before": 10, "after": 10 - (n - 10)} for n in range(21)]
    listed, title = predictions_section.most_changed(classes[:20])
    assert title == "All classes"
    changes = [(each["after"] - each["before"]) / each["images"] for each in listed]
    assert changes == sorted(changes)
    listed, title = predictions_section.most_changed(classes)
    assert title == "The first 10 and the last 10 of 21 classes"
    ordered = sorted(classes, key=lambda each: (each["after"] - each["before"]) / each["images"])
    assert listed == ordered[:10] + ordered[11:]
    scores = [{"before": 50.0, "after": 50.0 + change} for change in (1, -3, 2)]
    scores.insert(0, {"before": None, "after": 90.0})
    assert predictions_section.most_changed_scores(scores) == [scores[2], scores[3], scores[1], scores[0]]
    assert len(predictions_section.most_changed_scores(scores * 6)) == 20


def test_values_of_charts():
    assert (share(1, 4), share(3, 0)) == ("25.00%", "0.00%")
    groups = grouped([("a", 2.0), ("b", {"x": 3.0}), ("c", None)], "kind")
    assert groups == [("a", {"kind": 2.0}), ("b", {"x": 3.0}), ("c", {})]
    assert largest_value(groups) == 3.0
    assert largest_value([("a", {"x": 0.0}), ("b", {})]) == 1.0
    histogram = {"before": [1] * 5, "width": 0.5, "after": [1, 2], "after_width": 1.0}
    assert histogram_span(histogram) == 2.5
    assert histogram_span(histogram | {"after_width": 2.0}) == 4.0
    assert line_points([(0, 1.0), (5, 2.0), (10, 3.0)], 10, 1.0, 3.0) == ["0 62", "128 32", "256 2"]
    assert line_points([(10, 1.0)], 10, 1.0, 1.0) == ["256 62"]
    assert opacities([[0.0, 1.0], [2.0, 4.0]]) == [["0.04", "0.28"], ["0.52", "1.00"]]
    assert opacities([[3.0]]) == [["0.04"]]
