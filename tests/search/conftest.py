"""Fixtures of the tests of searches."""

import pytest

from search_fakes import latencies
from tersor.search import finish
from tersor.search.candidate import Candidate


@pytest.fixture
def fake_search(monkeypatch):
    """Latencies of all candidates, and no final measurement."""
    kept = [round(0.1 + 0.05 * step, 2) for step in range(19)]
    latencies(
        [Candidate("wide"), Candidate("deep")]
        + [Candidate(branches=b, keep_macs=k, bits=w) for b in range(10) for k in kept for w in ("8", "4", "mixed")]
    )
    monkeypatch.setattr(finish, "_speedup", lambda _search, _best: {})
