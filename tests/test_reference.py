"""The reference is complete: every public name, every class in a signature, every field of a published document."""

import inspect
import re
import typing
from importlib import import_module
from pathlib import Path

import pytest

import reference
import tersor
from tersor.cli_output import Document, schema_of
from tersor.data import load
from tersor.models import build
from tersor.search.folder import Front

API = Path(__file__).parents[1] / "docs" / "reference" / "api.md"


def listed():
    """All documented objects on the page, by path."""
    paths = re.findall(r"^::: (\S+)$", API.read_text(), re.MULTILINE)
    return {path: getattr(import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths}


def classes_in(hint):
    """The classes of tersor in a type."""
    if isinstance(hint, list):
        return {each for inner in hint for each in classes_in(inner)}
    if isinstance(hint, type) and not typing.get_origin(hint):
        return {hint} if hint.__module__.startswith("tersor.") else set()
    return {each for inner in typing.get_args(hint) for each in classes_in(inner)}


def classes_of(value):
    """The classes in the signature of a function, or in the public fields, methods and properties of a class."""
    hints = [hint for name, hint in typing.get_type_hints(value).items() if not name.startswith("_")]
    if isinstance(value, type):
        members = [member for name, member in inspect.getmembers(value) if not name.startswith("_")]
        functions = [member.fget if isinstance(member, property) else member for member in members]
        own = [each for each in functions if inspect.isfunction(each) and each.__module__.startswith("tersor.")]
        hints += [hint for each in own for hint in typing.get_type_hints(each).values()]
    return classes_in(hints)


def test_the_reference_contains_every_public_name():
    documented = listed().values()
    assert not [name for name in tersor.__all__ if not any(getattr(tersor, name) is each for each in documented)]


def test_the_reference_contains_every_class_in_public_signatures():
    documented = {each for each in listed().values() if isinstance(each, type)}
    pages = reference.generated()
    tables = pages["reference/recipe.md"] + pages["reference/front.md"]
    public = [*(getattr(tersor, name) for name in tersor.__all__), load, build, *listed().values()]
    seen = {each for each in public if isinstance(each, type) or inspect.isfunction(each)}
    waiting = list(seen)
    while waiting:
        new = classes_of(waiting.pop()) - seen
        seen |= new
        waiting += new
    classes = {each for each in seen if isinstance(each, type)}
    assert {"Result", "Choice", "Point", "Splits", "Images", "Budget"} <= {each.__name__ for each in classes}
    assert not {each.__name__ for each in classes - documented if f"\n## {each.__name__}\n" not in tables}


def restricted():
    """The paths on the page for which only some members are shown."""
    entries = re.findall(r"^::: (\S+)\n((?: +.*\n)*)", API.read_text(), re.MULTILINE)
    return {path for path, options in entries if re.search(r"^ +members:", options, re.MULTILINE)}


def fields_of(value):
    """Names of the public fields of a class, without those of base classes."""
    annotated = inspect.get_annotations(value, eval_str=True).items()
    return [name for name, hint in annotated if name[0] != "_" and typing.get_origin(hint) is not typing.ClassVar]


def test_the_reference_describes_every_field_of_its_classes():
    tables = "".join(reference.generated().values())
    classes = {path: value for path, value in listed().items() if isinstance(value, type)}
    missing = []
    for path, value in classes.items():
        lines = re.findall(r"^ +(\w+(?:, \w+)*):", value.__doc__ or "", re.MULTILINE)
        described = {name for line in lines for name in line.split(", ")}
        if path not in restricted():  # a text below a field is shown with the field
            described |= {name for name, field in getattr(value, "model_fields", {}).items() if field.description}
        if path in restricted():  # it may have a table on another page
            described |= {name for name in fields_of(value) if f"\n| `{name}` |" in tables}
        missing += [f"{path}.{name}" for name in fields_of(value) if name not in described]
    assert not missing
    assert fields_of(Front)[-2:] == ["dropped", "test_runs"]
    assert not {"tersor.search.folder.Front", "tersor.search.front.Point"} & restricted()


@pytest.mark.parametrize("document", [*Document.__args__, "front"])
def test_every_field_of_a_published_document_has_a_description(document):
    schema = Front.model_json_schema() if document == "front" else schema_of(document)
    records = {document: schema, **schema.get("$defs", {})}
    fields = {
        f"{name}.{key}": field
        for name, record in records.items()
        for key, field in record.get("properties", {}).items()
    }
    assert fields
    assert not [name for name, field in fields.items() if not field.get("description")]


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ({"type": "object", "patternProperties": {"^[0-9]$": {"type": "integer"}}}, "map to integer"),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "integer"}]}, "[integer, integer]"),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
        ({"type": "object"}, "map"),
    ],
)
def test_types_are_described_in_words(field, kind):
    assert reference._kind(field) == kind
