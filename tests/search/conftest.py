"""Fixtures of the tests of searches."""

import pytest

from search_fakes import without_measurements


@pytest.fixture
def fake_search(monkeypatch):
    """Latencies of all candidates, and no final measurement."""
    without_measurements(monkeypatch)
