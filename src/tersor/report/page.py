"""numbers.json and evidence.json -> report.html: one page, which loads nothing and runs no script.

What the artifact is compared with is picked by radio buttons, and the style sheet shows what belongs to the picked one.
So the page's policy can forbid every script, every request and every style but its own.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, cast

from tersor.core.errors import InputError
from tersor.core.files import read_json, write_file
from tersor.report.latency_section import latencies
from tersor.report.layers_section import layers, time_spent, weights
from tersor.report.predictions_section import answers, attention, similar, targets
from tersor.report.pruning_section import moved, pruned
from tersor.report.summary import figures, head, stages
from tersor.report.templates import Markup, join, tag
from tersor.report.training_section import drawn_weights, reconstructions
from tersor.report.verdict import verdict

REPORT = "report.html"


def draw(folder: Path) -> Path:
    """Writes `folder/report.html` from `numbers.json` and, where it is there, `evidence.json`; whole or not at all.

    Returns:
        The page.

    Raises:
        InputError: there is no `numbers.json`, or one of the two is not what a run writes.
    """
    numbers = _read(folder / "numbers.json")
    if numbers is None:
        raise InputError(f"{folder} holds no numbers.json, so there is nothing to report. Give the folder of a run.")
    try:
        page = _page(numbers, _read(folder / "evidence.json"))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise InputError(
            f"numbers.json or evidence.json of {folder} is not what this version of tersor writes: "
            f"{repr(error)[:200]}. Run its recipe.yaml again."
        ) from error
    path = folder / REPORT
    write_file(path, page.encode("utf-8", "replace"))  # class names come from file names, which may not be Unicode
    return path


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = read_json(path, "Run its recipe.yaml again.")
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object. Run its recipe.yaml again.")
    return cast("dict[str, Any]", found)


def _page(numbers: dict[str, Any], evidence: dict[str, Any] | None) -> str:
    style = files("tersor.report").joinpath("style.css").read_text(encoding="utf-8")
    template = Template(files("tersor.report").joinpath("page.html").read_text(encoding="utf-8"))
    inside = (
        [
            time_spent(numbers, evidence),
            layers(numbers, evidence),
            pruned(evidence),
            weights(evidence),
            targets(numbers, evidence),
            similar(numbers, evidence),
            attention(numbers, evidence),
            answers(numbers, evidence),
        ]
        if evidence
        else [tag("section", tag("p", _WITHOUT_EVIDENCE))]
    )
    measured = [head(numbers, evidence), figures(numbers), stages(numbers), moved(numbers), latencies(numbers)]
    return template.substitute(
        title=join([f"tersor: {verdict(numbers, evidence)}"]),
        policy=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        style=Markup(style),
        body=join([*measured, *inside, drawn_weights(numbers), reconstructions(numbers)]),
    )


_WITHOUT_EVIDENCE = (
    "There is no evidence.json beside numbers.json: without it there is no node profile, no table of the layers, no "
    "histogram and no changed answer to show."
)
