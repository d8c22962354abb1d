"""Reads inputs that libFuzzer finds, guided by the lines that they reach: `python guided.py KIND -runs=2000`."""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tersor.recipe", "tersor.checkpoint.structure", "tersor.report.page"]):
    from kinds import kind

from tersor.core.errors import InputError


def main() -> None:
    """Begins with the whole files of the kind."""
    read = kind(sys.argv.pop(1))
    corpus = Path(tempfile.mkdtemp())
    for number, content in enumerate(read.seeds):
        (corpus / str(number)).write_bytes(content)

    def one(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder, suppress(InputError):
            read.read(content, Path(folder))

    atheris.Setup([*sys.argv, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
