from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import evidence_of, numbers_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "numbers.json").write_text(json.dumps(numbers_of()))
    (tmp_path / "evidence.json").write_text(json.dumps(evidence_of()))
    return tmp_path
