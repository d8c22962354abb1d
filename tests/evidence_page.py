"""The keys of `evidence.json` that are missing from `docs/reference/evidence.md`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "evidence.md"


def undocumented(evidence: dict[str, Any], section: str) -> set[str]:
    """Paths in `evidence` without a row in the section "evidence.json of a run" or "evidence.json of a search".

    A value that is none or empty needs a row for itself or for anything in it.
    """
    text = PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ", text, re.MULTILINE)
    assert rows
    patterns = [re.compile(re.sub(r"\b[A-Z]+\b", ".+", re.sub(r"([.\[\]])", r"\\\1", row))) for row in rows]
    return {
        path
        for path, empty in _paths(evidence)
        if not any(pattern.fullmatch(path) for pattern in patterns)
        and not (empty and any(row.startswith((f"{path}.", f"{path}[")) for row in rows))
    }


def _paths(value: Any, path: str = "") -> Iterator[tuple[str, bool]]:
    """The path of every value, and whether the value is none or empty."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for inner in value:
            yield from _paths(inner, f"{path}[]")
    else:
        yield path, value is None or value in ({}, [])
