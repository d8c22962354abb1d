"""`numbers.json` and `evidence.json` -> `report.html`: one page that loads nothing and runs no script.

`templates/page.html` includes a template for each section. Sections take plain values from `numbers` and `evidence`,
computed values from the functions of `summary.py` and `*_section.py`, and macros from `tables.html` and `charts.html`.

Radio buttons select the reference that the artifact is compared with; the style sheet shows what belongs to it. So the
page's security policy can forbid all scripts, requests and external styles.
"""

from __future__ import annotations

import base64
import hashlib
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from markupsafe import Markup

from tersor.core.errors import InputError
from tersor.core.files import read_json, write_file
from tersor.evaluation.costs import FLOAT_BITS
from tersor.evaluation.results import Results
from tersor.quantization.integer_coverage import ENOUGH, percent
from tersor.report import layers_section, predictions_section, summary, training_section, verdict
from tersor.report.templating import environment

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from `numbers.json` and, if there is one, `evidence.json`; atomically.

    Returns:
        The page.

    Raises:
        InputError: there is no `numbers.json`, or one of the two is not what a run writes.
    """
    path = folder / "numbers.json"
    if not path.is_file():
        raise InputError(f"{folder} has no numbers.json, so there is nothing to report. Give the folder of a run.")
    try:
        numbers = Results.model_validate(_read(path))
        evidence = _read(folder / "evidence.json")
        page = _render(numbers, evidence)
    except InputError:  # names the file and the damage
        raise
    except (
        *(ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError),
        TemplateError,
    ) as error:
        raise InputError(
            f"numbers.json or evidence.json of {folder} was not written by this version of tersor: "
            f"{repr(error)[:200]}. Run its recipe.yaml again."
        ) from error
    path = folder / REPORT
    write_file(path, page.encode("utf-8", "replace"))  # class names come from file names, which may not be Unicode
    return path


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = read_json(path, "Run its recipe.yaml again.")
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it is not a JSON object. Run its recipe.yaml again.")
    return cast("dict[str, Any]", content)


def style_values() -> dict[str, Any]:
    """The style sheet of a page, and its hash for the page's security policy."""
    style = files("tersor.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    return {"style": Markup(style), "style_hash": _hash(style)}  # noqa: S704  # our own file


def script_values(name: str) -> dict[str, Any]:
    """The script `templates/NAME` of a page, and its hash for the page's security policy."""
    script = files("tersor.report").joinpath(f"templates/{name}").read_text(encoding="utf-8")
    return {"script": Markup(script), "script_hash": _hash(script)}  # noqa: S704  # our own file


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _render(numbers: Results, evidence: dict[str, Any] | None) -> str:
    class_name = partial(predictions_section.class_name, numbers)
    return environment().get_template("page.html").render(
        numbers=numbers,
        evidence=evidence,
        **style_values(),
        verdict=verdict,
        references=summary.references(numbers),
        summary=summary,
        training=training_section,
        layers=layers_section,
        predictions=predictions_section,
        class_name=class_name,
        class_names=lambda indices: [class_name(index) for index in indices],
        macs_percent=percent,
        float_bits=FLOAT_BITS,
        enough_in_integers=ENOUGH,
    )  # fmt: skip
