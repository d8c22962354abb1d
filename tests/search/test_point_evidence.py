"""Node times of the points of a search."""

from types import SimpleNamespace

import numpy as np

from search_fakes import baseline
from tersor.search import point_evidence


def test_a_file_with_a_fixed_batch_size_is_profiled_at_that_size(tmp_path, monkeypatch):
    seen = []

    def profile(_file, _runtime, images, _names, runs):
        seen.append(len(images))
        return {"kinds": [], "layers": {}}

    monkeypatch.setattr(point_evidence, "profile", profile)
    image, point = np.zeros((1, 3, 8, 8), np.float32), baseline("original", 90.0, 1.0, "float32")
    for fixed, batches, runs in ((None, [1, 128], [1, 1]), (1, [1], [1, 128]), (3, [3], [1, 43])):
        seen.clear()
        monkeypatch.setattr(point_evidence, "open_session", lambda *_, fixed=fixed: SimpleNamespace(batch=fixed))
        times = point_evidence._times(tmp_path, point, image, {})
        assert seen == batches
        assert [times[size][0] for size in ("1", "128")] == runs
