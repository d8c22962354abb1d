from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import evidence_of, numbers_of, one_line

from tersor.report.page import write_report
from tersor.report.templating import environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "numbers.json").write_text(json.dumps(numbers_of()))
    (tmp_path / "evidence.json").write_text(json.dumps(evidence_of()))
    return tmp_path


@pytest.fixture
def page(folder: Path) -> Callable[..., str]:
    """A function that returns the report of the folder, optionally with other numbers or evidence."""

    def render(numbers: dict | None = None, evidence: dict | None = None) -> str:
        for name, content in (("numbers", numbers), ("evidence", evidence)):
            if content is not None:
                (folder / f"{name}.json").write_text(json.dumps(content))
        return one_line(write_report(folder).read_text(encoding="utf-8"))

    return render


@pytest.fixture
def chart() -> Callable[..., str]:
    """A function that calls a macro of `charts.html` by name."""
    macros = environment().get_template("charts.html").module
    return lambda name, *arguments, **options: one_line(getattr(macros, name)(*arguments, **options))
