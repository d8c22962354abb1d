"""Code blocks in pages: found, run in order, and turned into notebooks.

A page's Python blocks share one namespace. An image link after a block names the file of the figure that the block
drew, and a `text` block after it holds what it printed.

    OMP_NUM_THREADS=1 python pages/blocks.py    write the tutorial's figures and outputs, and the notebooks
    python pages/blocks.py notebooks            write the notebooks alone
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
TUTORIAL = ("tutorial/index.md", "tutorial/distillation.md", "tutorial/quantization.md", "tutorial/pruning.md")
NOTEBOOKS = {"tutorial": TUTORIAL, "compress_your_own_classifier": ("how-to/own-network.md",)}
"""Notebook -> the pages that it is made of."""

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```\n?", re.MULTILINE | re.DOTALL)
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)]+\.svg)\)\n?")
_NOTEBOOK_SENTENCE = re.compile(r"\s[^.]*\]\([^)]*\.ipynb\)[^.]*\.")


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language, without their indentation."""
    found = _FENCE.findall((DOCS / page).read_text())
    return [textwrap.dedent(code) for _, name, code in found if name == language]


def run(page: str, namespace: dict[str, Any], after: Callable[[int], None] | None = None) -> list[str]:
    """Run the Python blocks of a page in order; return what each printed.

    Args:
        page: path in docs/.
        namespace: namespace of all blocks; the blocks add to it.
        after: called with the number of each block that was run.
    """
    printed: list[str] = []
    for number, code in enumerate(blocks(page, "python")):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, f"{page}, block {number + 1}", "exec", dont_inherit=True), namespace)
        printed.append(output.getvalue())
        if after is not None:
            after(number)
    return printed


def figure_after(page: str, number: int) -> Path | None:
    """The image file that follows a Python block before the next one."""
    text = (DOCS / page).read_text()
    starts = [found for found in _FENCE.finditer(text) if found[2] == "python"]
    end = starts[number + 1].start() if number + 1 < len(starts) else len(text)
    found = _IMAGE.search(text, starts[number].end(), end)
    return None if found is None else (DOCS / page).parent / found[1]


def with_outputs(text: str, printed: Sequence[str]) -> str:
    """The page with the output of every Python block in the `text` block that follows it."""
    outputs = iter(printed)
    last = ""

    def replaced(found: re.Match[str]) -> str:
        nonlocal last
        if found[2] == "python":
            last = next(outputs)
        if found[2] != "text":
            return found[0]
        return f"```text\n{last.rstrip()}\n```\n"

    return _FENCE.sub(replaced, text)


def notebook(pages: Sequence[str]) -> str:
    """The pages as a Jupyter notebook: their text, and their Python blocks as cells without outputs."""
    cells: list[dict[str, Any]] = []
    for page in pages:
        text = (DOCS / page).read_text()
        end = 0
        for found in [*_FENCE.finditer(text), None]:
            if found is None or found[2] == "python":
                between = text[end : found.start() if found else len(text)]
                cells.append(_cell("markdown", _prose(between), len(cells)))
            if found is None:
                break
            if found[2] == "python":
                cells.append(_cell("code", textwrap.dedent(found[3]), len(cells)))
                end = found.end()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": [cell for cell in cells if cell["source"]],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _prose(text: str) -> str:
    """Text of a page without what only the site shows: outputs, figures, links, and sentences about its notebook."""
    text = _FENCE.sub(lambda found: "" if found[2] == "text" else found[0], text)
    text = _NOTEBOOK_SENTENCE.sub("", _IMAGE.sub("", text))
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)


def _cell(kind: str, source: str, number: int) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell | {"source": source.strip("\n").splitlines(keepends=True)}


def write() -> None:
    """Run the tutorial; write figures, outputs and notebooks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update(
        {"svg.hashsalt": "tersor", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    namespace: dict[str, Any] = {}
    for page in TUTORIAL:

        def save(number: int, page: str = page) -> None:
            if plt.get_fignums():
                path = figure_after(page, number)
                assert path is not None, f"{page}: no image follows block {number + 1}"
                plt.savefig(path, metadata={"Date": None})
                plt.close("all")

        printed = run(page, namespace, save)
        sys.stdout.write("".join(printed))
        path = DOCS / page
        path.write_text(with_outputs(path.read_text(), printed))
    write_notebooks()


def write_notebooks() -> None:
    """Write the notebooks."""
    for name, pages in NOTEBOOKS.items():
        (DOCS / "notebooks" / f"{name}.ipynb").write_text(notebook(pages))


if __name__ == "__main__":
    if sys.argv[1:] == ["notebooks"]:
        write_notebooks()
    else:
        write()
