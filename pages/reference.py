"""The pages generated from the code: method cards, recipe keys, numbers.json, front.json, the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer.main
from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO
from typer.cli import get_docs_for_click

import gains
from tersor import methods
from tersor.cli import app
from tersor.evaluation.results import Results
from tersor.recipe import Recipe, parameters
from tersor.search.folder import Front

Schema = dict[str, Any]


def generated() -> dict[str, str]:
    """Path in `docs/` -> Markdown, of all generated pages."""
    cards = {f"methods/{name}.md": card(name) for name in methods.names()}
    return cards | {
        "reference/recipe.md": recipe_page(),
        "reference/numbers.md": numbers_page(),
        "reference/front.md": front_page(),
        "reference/command-line.md": command_line(),
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def card(name: str) -> str:
    """A method: its gain, its docstring, its parameters, and its entry in a recipe."""
    cls = methods.get(name)
    title, _, rest = (sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")
    gain = gains.GAINS[name].sentence() if name in gains.GAINS else "Its gain has not been measured yet."
    avoid = f"\n\n**When not to use it:** {gains.GAINS[name].avoid}" if name in gains.GAINS else ""
    lines = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(text)} |"
        for key, kind, default, text in parameters(cls)
    ]
    return (
        f"# `{name}`\n\n{title}\n\n{gain}{avoid}\n\n## Definition\n\n{rest.strip()}\n\n## Parameters\n\n"
        + "\n".join(lines)
        + f"\n\n## In a recipe\n\n```yaml\n{_entry(name, cls)}```\n"
    )


def _entry(name: str, cls: Any) -> str:
    """A stage with the method and its example parameters."""
    stage: dict[str, Any] = {"name": name.replace("_", "-")}
    if getattr(cls, "needs_steps", False):
        stage["epochs"] = 5
    stage["methods"] = [{name: dict(cls.example)} if cls.example else name]
    text = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump({"stages": [stage]}, text)
    return text.getvalue()


def recipe_page() -> str:
    """The keys of a recipe."""
    text = (
        "# Recipe keys\n\nA recipe is a YAML file. `tersor schema` prints this page as a JSON schema for editors. The "
        "parameters of a method are on its card.\n\n"
    )
    return text + "\n\n".join(_tables(Recipe.model_json_schema(), "recipe.yaml"))


def numbers_page() -> str:
    """The entries of numbers.json."""
    text = (
        "# numbers.json\n\nA run writes its measurements to `numbers.json`. `tersor schema results` prints this page "
        "as a JSON schema. [What the numbers mean](../how-to/recipes.md#what-the-numbers-mean) explains them.\n\n"
    )
    return text + "\n\n".join(_tables(Results.model_json_schema(), "numbers.json"))


def front_page() -> str:
    """The entries of front.json."""
    text = (
        "# front.json\n\nA search writes its budget, its result and all measured points to `front.json`. The "
        "`numbers.json` next to the file of each point contains the entries of [Point](#point).\n\n"
    )
    return text + "\n\n".join(_tables(Front.model_json_schema(), "front.json"))


def _tables(schema: Schema, title: str) -> Iterator[str]:
    """A table for the schema itself and for every record in it."""
    for name, record in {title: schema, **schema.get("$defs", {})}.items():
        if "properties" not in record:
            continue
        about = str(record.get("description", "")).partition("\n")[0]
        lines = [f"## {name}", "", about, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in record["properties"].items():
            default = _default(field, key in record.get("required", []))
            lines.append(f"| `{key}` | {_kind(field)} | {default} | {_cell(field.get('description', ''))} |")
        yield "\n".join(lines)


def _default(field: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = field.get("default")
    if value is None or value == "" or isinstance(value, dict | list):
        return ""
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _kind(field: Mapping[str, Any]) -> str:
    """The type of a key in words, with links to the records on the same page."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "prefixItems" in field:
        return f"[{', '.join(map(_kind, field['prefixItems']))}]"
    if field.get("type") == "array" and isinstance(field.get("items"), dict):
        return f"list of {_kind(field['items'])}" if field["items"] else "list"
    values = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")]
    if field.get("type") == "object" and isinstance(values[0], dict):
        return f"map to {_kind(values[0])}"
    words = {"integer": "integer", "object": "map", "string": "text", "boolean": "true or false"}
    return words.get(field.get("type", ""), field.get("type", "any"))


def command_line() -> str:
    """Every command, from its `--help`."""
    command = typer.main.get_command(app)
    with typer.Context(command, info_name="tersor") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="tersor", title="Command line")
    return text + "\nThe exit codes are explained in [For coding agents](../agents.md#exit-codes).\n"
