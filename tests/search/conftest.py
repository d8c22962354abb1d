"""Fixtures of the tests of searches."""

import pytest

from search_fakes import without_measurements
from tersor.search import halving


@pytest.fixture
def fake_search(monkeypatch):
    """Latencies of all candidates, and no final measurement."""
    without_measurements(monkeypatch)


@pytest.fixture
def _no_other_removal(monkeypatch):
    """No candidates are added during training, so that the same ones are trained to the end."""
    monkeypatch.setattr(halving, "further_removals", lambda *_: [])
    monkeypatch.setattr(halving, "smaller_removals", lambda *_: [])
