"""Progress without a reporter."""

import warnings

import pytest

from tersor.core.errors import CompressionWarning
from tersor.core.progress import StageProgress, WarningProgress


def test_without_a_reporter_only_warnings_are_issued():
    progress = WarningProgress()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress.start("compress", 10)
        progress.advance(loss=0.5)
        progress.say("normalization: mean 0.5, std 0.5")
    with pytest.warns(CompressionWarning, match=r"^3 of 10 classes have no training image$"):
        progress.say("warning: 3 of 10 classes have no training image")
    with pytest.warns(CompressionWarning, match=r"^ptq: 3 layers stay in float$"):
        StageProgress("ptq", progress).say("warning: 3 layers stay in float")
