"""Warnings of a search about its validation images."""

from pathlib import Path

import pytest

from search_fakes import FakeBench, FakeTime, searching
from tersor.search.search_metric import Measured
from tersor.search.survey import _seen

pytestmark = pytest.mark.usefixtures("fake_search")


@pytest.mark.parametrize(
    ("validation", "test", "seen", "words"),
    [
        (97.0, 90.0, True, "the original was probably trained on the validation images"),
        (93.0, 90.0, False, "may have been trained on the validation images: accuracy 93.00 % there, 90.00 % on"),
        (92.0, 90.0, False, ""),  # 1.6 standard errors, as one of nineteen originals that have not seen them
        (100.0, 99.9, False, ""),
        (90.5, 90.0, False, ""),
        (88.0, 90.0, False, ""),
    ],
)
def test_an_original_trained_on_the_validation_images_causes_a_warning(
    tmp_path, monkeypatch, validation, test, seen, words
):
    monkeypatch.setattr(FakeBench, "test_metric", lambda *_: test, raising=False)
    monkeypatch.setattr(FakeBench, "measured", lambda *_: Measured(validation), raising=False)
    search, lines = searching(tmp_path / "out", bench=FakeBench(FakeTime())), []
    monkeypatch.setattr(search.bar, "tell", lines.append)
    assert _seen(search, Path("original.onnx")) == seen
    assert len(lines) == bool(words)
    assert words in "".join(lines)
