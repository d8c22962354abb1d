"""The text of a recipe: YAML 1.2 to plain values with their line numbers, and plain values to text.

PyYAML implements YAML 1.1: `2:4` is 124, `1e-4` is text, `on` is true, and a key may occur twice. Here, the nodes of
ruamel.yaml are read before any Python object is created from them, so that every value has a line number.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from tersor.core.errors import InputError

Location = tuple[int | str, ...]
"""Keys and indices that lead to a value, as pydantic gives them."""

_DEEPEST = 20
_MISSING = "???"
"""A value that the user of a recipe gives, as OmegaConf writes it."""
_MOST = 20_000
_BITS = 63
_TAG = "tag:yaml.org,2002:"
_TEXT = {_TAG + kind for kind in ("str", "timestamp", "value", "merge")}  # the last three are YAML 1.1: text in 1.2


@dataclass
class Located:
    """A value of the text and its position. The value is a scalar, or a list or dict of further `Located`."""

    value: Any
    line: int
    place: str


class _Reader:
    """Turns ruamel's nodes into `Located`, and gathers what is wrong on the way."""

    def __init__(self, place: Callable[[int], str]) -> None:
        self.place = place
        self.problems: list[str] = []
        self.yaml = YAML(typ="safe", pure=True)
        self.open: set[int] = set()
        self.values = 0

    def read(self, text: str) -> Located:
        node = self.yaml.compose(text)
        return self.convert(node, node.start_mark.line + 1) if node else Located(None, 1, self.place(1))

    def complain(self, line: int, message: str) -> None:
        self.problems.append(f"{self.place(line)}: {message}")

    def convert(self, node: Node, line: int) -> Located:
        self.values += 1
        if self.values > _MOST:  # aliases of aliases: a few lines name more values than any memory holds
            raise InputError(
                f"{self.place(line)}: there are more than {_MOST:,} values, including those that aliases repeat."
            )
        if id(node) in self.open:
            self.complain(line, f"the alias *{node.anchor} refers to a value that contains it.")
            return Located(None, line, self.place(line))
        if len(self.open) > _DEEPEST:
            self.complain(line, "this is nested too deeply for a recipe.")
            return Located(None, line, self.place(line))
        self.open.add(id(node))
        if isinstance(node, MappingNode):
            value = self.mapping(node)
        elif isinstance(node, SequenceNode):
            value = [self.convert(item, item.start_mark.line + 1) for item in node.value]
        else:
            assert isinstance(node, ScalarNode)
            value = self.scalar(node, line)
        self.open.remove(id(node))
        return Located(value, line, self.place(line))

    def mapping(self, node: MappingNode) -> dict[str, Located]:
        entries: dict[str, Located] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                self.complain(line, "a key should be a name, got a list or a mapping.")
            elif key.value in entries:
                self.complain(line, f"the key '{key.value}' is given twice, first on line {entries[key.value].line}.")
            else:
                entries[self.text(key.value, line)] = self.convert(value, line)
        return entries

    def scalar(self, node: ScalarNode, line: int) -> Any:
        if node.tag in _TEXT:
            return self.text(node.value, line)
        if not node.tag.startswith(_TAG):
            self.complain(line, f"the tag {node.tag} is not supported. Remove it: recipes are plain YAML.")
            return None
        try:
            value = self.yaml.constructor.construct_object(node)
        except (ValueError, YAMLError):
            self.complain(line, f"{shown(node.value)} cannot be read as {node.tag.removeprefix(_TAG)}.")
            return None
        if isinstance(value, int) and value.bit_length() > _BITS:
            self.complain(line, f"a whole number should have at most {_BITS} bits, got {value.bit_length()} bits.")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self.complain(line, f"a number should be finite, got {node.value}.")
        return value

    def text(self, value: str, line: int) -> str:
        # a lone surrogate is no Unicode, and no name of a file or a model holds a control character
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
            self.complain(line, f"text should have no control characters, got {shown(value)}.")
        return value


def load(text: str, name: str, *, lines: bool = True) -> Located:
    """The values of a YAML text.

    Args:
        text: YAML 1.2, one document.
        name: name of the text in error messages.
        lines: whether error messages also contain the line number.

    Raises:
        InputError: it is not YAML, or a key is given twice; one line for each problem.
    """
    reader = _Reader(lambda line: f"{name}, line {line}" if lines else name)
    try:
        tree = reader.read(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{reader.place(mark.line + 1 if mark else 1)}: this is not YAML: {reason}.") from None
    except ReaderError as error:
        raise InputError(f"{name}: this is not YAML text: {error.reason}.") from None
    except RecursionError:
        raise InputError(f"{name}: this is nested too deeply for a recipe.") from None
    if reader.problems:
        raise InputError("\n".join(reader.problems))
    return tree


def override(tree: Located, assignment: str) -> None:
    """Set one value in `tree`.

    Args:
        tree: the result of `load`; it is changed.
        assignment: `path=value`, such as `stages.0.epochs=3`. The path consists of keys and list indices, separated by
            dots; the value is YAML.

    Raises:
        InputError: the path does not exist, or the value is not YAML.
    """
    place = f"--set {assignment}"
    path, equals, text = assignment.partition("=")
    rest = path = path.strip()
    if not equals or not all(path.split(".")):
        raise InputError(f"{place}: write it as path=value, such as stages.0.epochs=3.")
    value = load(text, place, lines=False)
    node = tree
    while rest:
        where = path.removesuffix(rest).removesuffix(".") or "the recipe"
        part = _first_part(node, rest)
        node, rest = _inside(node, part, place, where), rest[len(part) + 1 :]
    node.value, node.line, node.place = value.value, 0, place


def _first_part(node: Located, path: str) -> str:
    """The part of a path up to the next dot, or a key with dots, such as `net.py:Grow`."""
    keys = [str(key) for key in node.value] if isinstance(node.value, dict) else []
    keys += [node.value] if isinstance(node.value, str) else []
    dotted = [key for key in keys if "." in key and f"{path}.".startswith(f"{key}.")]
    return max(dotted, key=len, default=path.partition(".")[0])


def _inside(node: Located, part: str, place: str, where: str) -> Located:
    if node.value is None or (isinstance(node.value, str) and node.value == part):  # the latter: `- soft_targets`
        node.value = {}
    if isinstance(node.value, dict):
        return node.value.setdefault(part, Located(None, 0, place))  # validation judges the key
    if not isinstance(node.value, list):
        raise InputError(f"{place}: {where} is {shown(node.value)}, and there is no '{part}' in it.")
    indices = [str(index) for index in range(len(node.value))]
    if part not in indices:
        raise InputError(f"{place}: there is no '{part}' in {where}. Possible: {', '.join(indices) or 'none'}.")
    return node.value[int(part)]


def complete(tree: Located) -> Located:
    """Check that no value is `???`, the placeholder for values that the user has to write. Return the tree.

    Raises:
        InputError: values are missing; the message names all of them.
    """
    missing = dict(_missing(tree, ""))
    if missing:
        place = next(iter(missing.values()))
        names, options = ", ".join(missing), " ".join(f"--set {path}=..." for path in missing)
        raise InputError(
            f"{place}: values are missing: {names}. Write them in place of {_MISSING}, or add to the command: {options}"
        )
    return tree


def _missing(node: Located, path: str) -> Iterator[tuple[str, str]]:
    """Path and place of each value that is missing."""
    if isinstance(node.value, dict | list):
        entries = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        for key, entry in entries:
            yield from _missing(entry, f"{path}.{key}".lstrip("."))
    elif node.value == _MISSING:
        yield path, node.place


def plain(tree: Located) -> Any:
    """The values without their positions."""
    if isinstance(tree.value, dict):
        return {key: plain(value) for key, value in tree.value.items()}
    if isinstance(tree.value, list):
        return [plain(value) for value in tree.value]
    return tree.value


def shown(value: Any) -> str:
    """A value as text for a message."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value[:60]!r}"
        case dict():
            return "a mapping"
        case list():
            return f"a list of length {len(value)}"
        case _:
            return str(value)[:60]


def dump(data: dict[str, Any]) -> str:
    """The text of a recipe: one line for each network, data set and method. `load` and `plain` undo it."""
    data = _numbers(data)
    tree = {key: _flow(value) for key, value in data.items() if key != "stages"}
    tree["stages"] = [_stage(stage) for stage in data["stages"]]
    yaml = YAML()
    yaml.width = 110
    yaml.indent(sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(tree, out)
    return out.getvalue()


def _numbers(value: Any) -> Any:
    """Values as one writes them: 4, not 4.0."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e9 else value


def _flow(value: Any) -> Any:
    """Mappings and lists on one line."""
    if isinstance(value, str):  # ruamel.yaml writes `?0` without quotes, and cannot read it inside of braces
        return value if re.fullmatch(r"\w[\w./-]*", value, re.ASCII) else DoubleQuotedScalarString(value)
    if isinstance(value, dict):
        value = CommentedMap({_flow(key): _flow(item) for key, item in value.items()})
    elif isinstance(value, list):
        value = CommentedSeq([_flow(item) for item in value])
    else:
        return value
    value.fa.set_flow_style()
    return value


def _stage(stage: dict[str, Any]) -> dict[str, Any]:
    """Name and length first, each method on a line of its own last."""
    first = {key: _flow(stage[key]) for key in ("name", "epochs", "steps") if key in stage}
    rest = {key: _flow(value) for key, value in stage.items() if key not in first and key != "methods"}
    listed = {"methods": [_flow(entry) for entry in stage["methods"]]} if "methods" in stage else {}
    return first | rest | listed
