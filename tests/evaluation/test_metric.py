"""How the values of a metric are formatted."""

from tersor.evaluation.metric import Metric

ACCURACY = Metric(name="accuracy", unit="%", higher_is_better=True)
ERROR = Metric(name="error", unit="", higher_is_better=False)


def test_a_metric_with_a_unit_is_formatted():
    assert ACCURACY.shown(91.204) == "91.20 %"
    assert ACCURACY.title == "accuracy, %"
    assert ACCURACY.titled("validation") == "validation, %"
    assert ACCURACY.loss(90.0, 88.5) == 1.5


def test_a_metric_without_a_unit_is_formatted():
    assert ERROR.shown(0.12345) == "0.1235"
    assert ERROR.title == "error"
    assert ERROR.titled("validation") == "validation"
    assert ERROR.loss(0.25, 0.75) == 0.5
