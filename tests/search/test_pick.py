"""`tersor pick` without limits."""

import sys

import pytest
from front_samples import front_of

from tersor import cli
from tersor.search.result import Result


def test_it_lists_the_front_and_picks_by_the_budget_of_the_search(tmp_path, monkeypatch, capfd):
    made = front_of(3)
    limits = {"max_drop": 0.1, "latency_ms": {}, "megabytes": None}
    (original, *_) = (point for point in made.points if point.name == "original")
    made = made.model_copy(update={"limits": limits})
    (tmp_path / "front.json").write_text(made.model_dump_json())
    assert Result(tmp_path, made).pick().point == original
    assert Result(tmp_path, made).pick(max_drop=1).point.name == "best"
    monkeypatch.setattr(sys, "argv", ["tersor", "pick", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    shown = capfd.readouterr().out
    assert "budget of the search: at most 0.1 points lost" in shown
    assert "original, 9 branches" in shown
    assert f"file: {tmp_path / original.file}" in shown.replace("\n", "")
