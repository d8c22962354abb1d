"""Introduce single-line bugs and check whether `make test` finds them.

`choose` draws single-line breaks from src/ and writes them to bench/breaks.json: a reversed comparison, + for -, a
removed `not`, a constant changed by one, `min` for `max`, a removed statement or return value. A break is identified by
the text of its line, so it can be tried on any commit that has the line. `replace` sets a break aside that changes no
result, with the reason, and draws another one of the same group.

`run` tries each break on a commit: first the tests that mirror the broken module, or those that `--tests` names, then
all of `make test`. A test that also fails without the break does not count. Rows go to bench/results/breaks.json one by
one; existing rows are skipped.

    python bench/breaks.py choose --commits 5e5b625 HEAD
    python bench/breaks.py run --commit 5e5b625
    python bench/breaks.py replace 7 "the branch below handles the same case"
    python bench/breaks.py run
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import rows

RESULT = "breaks"
CHOSEN = rows.ROOT / "bench" / "breaks.json"
SEED = 4
GROUPS = {
    "graph and models": (4, r"(graph|models)/"),
    "quantization": (3, r"quantization/"),
    "pruning": (4, r"pruning/"),
    "methods": (5, r"methods/"),
    "training": (3, r"training/"),
    "deploy and evaluation": (3, r"(deploy|evaluation)/"),
    "data and core": (3, r"(data|core)/"),
    "report": (1, r"report/"),
    "recipes, runs and verbs": (1, r"(recipe|pipeline|checkpoint|api)"),
    "search": (2, r"search/"),
    "tasks": (1, r"tasks/"),
}
"""The number of breaks in each group of files, selected by path under src/tersor/."""

_FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}
_SILENT = re.compile(r"\b(say|advance|start|print|warn|simplefilter|Field|InputError|unknown|cast|perf_counter)\(")
_ELSEWHERE = re.compile(r"_NOTHING|eps|cuda|mps|darwin|Darwin|windows|arm64|platform|TYPE_CHECKING|stacklevel")
"""Lines that no test on this machine can run, that only affect a message, or that only keep a divisor above 0."""

_MIRRORS = 8
_TOO_LONG_S = {"mirror": 600, "whole": 7200}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-rfE"]
WHOLE = ["-n", "2", "--dist", "loadfile"]


@dataclass(frozen=True)
class Break:
    """One line of `file`, without its indentation, and its replacement."""

    file: str
    before: str
    after: str
    kind: str
    equivalent: str | None = None
    """Why the line computes the same as before, if it does. Such a break is not counted."""

    @property
    def identity(self) -> dict[str, str]:
        """The fields of a row."""
        return {"file": self.file, "before": self.before, "after": self.after, "kind": self.kind}


def mutations(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the kind and new text of each break of one node."""
    match node:
        case ast.Compare(left, [operator], [right]) if type(operator) in _FLIPPED:
            yield "comparison", _text(ast.Compare(left, [_FLIPPED[type(operator)]()], [right]))
        case ast.BinOp(left, operator, right) if type(operator) in _SWAPPED:
            yield "arithmetic", _text(ast.BinOp(left, _SWAPPED[type(operator)](), right))
        case ast.BoolOp(operator, values):
            yield "and, or", _text(ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values))
        case ast.UnaryOp(ast.Not(), operand):
            yield "not", _text(operand)
        case ast.Constant(bool() as value):
            yield "constant", str(not value)
        case ast.Constant(int() | float() as value):
            yield "constant", str(value + 1)
        case ast.Name(name) if name in _NAMES:
            yield "extreme", _NAMES[name]
        case ast.Return(ast.expr()):
            yield "return", "return None"
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield "statement", "pass"
        case _:
            pass


def _text(node: ast.expr) -> str:
    return f"({ast.unparse(ast.fix_missing_locations(node))})"


def breaks_of(file: str, source: str) -> Iterator[Break]:
    """Yield every break of the functions in one file whose line occurs once."""
    lines = source.splitlines()
    stripped = [line.strip() for line in lines]
    tree = ast.parse(source)
    skipped = {id(inner) for node in ast.walk(tree) for outer in _not_executed(node) for inner in ast.walk(outer)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {id(node): node for function in functions for part in function.body for node in ast.walk(part)}
    for node in inside.values():
        if id(node) in skipped or getattr(node, "lineno", 0) != getattr(node, "end_lineno", 1):
            continue
        line = lines[node.lineno - 1]  # type: ignore[attr-defined]
        if stripped.count(line.strip()) > 1 or _SILENT.search(line) or _ELSEWHERE.search(line):
            continue
        start, end = (len(line.encode()[:place].decode()) for place in (node.col_offset, node.end_col_offset))  # type: ignore[attr-defined]
        for kind, text in mutations(node):
            after = line[:start] + text + line[end:]
            broken = "\n".join([*lines[: node.lineno - 1], after, *lines[node.lineno :]])  # type: ignore[attr-defined]
            if after != line and _compiles(broken):
                yield Break(file, line.strip(), after.strip(), kind)


def _not_executed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of a node that are messages, types or internal checks."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.keyword(arg="strict"):
            yield node
        case ast.FunctionDef():
            yield from [node.args, *node.decorator_list, *([node.returns] if node.returns else [])]
            if any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list):
                yield node
        case ast.AnnAssign():
            yield node.annotation
        case ast.ClassDef() if any("Protocol" in ast.unparse(base) for base in node.bases):
            yield node
        case _:
            pass


def _compiles(source: str) -> bool:
    try:
        compile(source, "broken", "exec")
    except SyntaxError:
        return False
    return True


def candidates(commits: Sequence[str]) -> list[Break]:
    """Return all breaks that exist in every commit."""
    possible: list[set[Break]] = []
    for commit in commits:
        files = _git("ls-tree", "-r", "--name-only", commit, "src/tersor").splitlines()
        sources = {file: _git("show", f"{commit}:{file}") for file in files if file.endswith(".py")}
        possible.append({each for file, source in sources.items() for each in breaks_of(file, source)})
    return sorted(set.intersection(*possible), key=lambda each: (each.file, each.before, each.after))


def draw(group: Sequence[Break], chosen: Sequence[Break], generator: random.Random) -> Break:
    """Return a break of the group, preferably of a file and a kind that `chosen` does not have."""
    files, kinds = ([getattr(each, key) for each in chosen] for key in ("file", "kind"))
    rarest = min((files.count(each.file), kinds.count(each.kind)) for each in group)
    return generator.choice([each for each in group if (files.count(each.file), kinds.count(each.kind)) == rarest])


def choose(commits: Sequence[str], seed: int) -> list[Break]:
    """Return breaks that exist in every commit, spread over `GROUPS`."""
    possible = candidates(commits)
    generator = random.Random(seed)  # noqa: S311 - a draw, no secret
    chosen: list[Break] = []
    for number, pattern in GROUPS.values():
        group = [each for each in possible if re.match(rf"src/tersor/{pattern}", each.file)]
        for _ in range(number):
            chosen.append(draw(group, chosen, generator))
    return chosen


def replace(chosen: list[Break], number: int, reason: str, seed: int) -> list[Break]:
    """Set a break aside for a reason, and add another one of its group."""
    (pattern,) = [each for _, each in GROUPS.values() if re.match(rf"src/tersor/{each}", chosen[number].file)]
    group = [each for each in candidates(["HEAD"]) if re.match(rf"src/tersor/{pattern}", each.file)]
    generator = random.Random(seed + len(chosen))  # noqa: S311 - a draw, no secret
    kept = [*chosen[:number], dataclasses.replace(chosen[number], equivalent=reason), *chosen[number + 1 :]]
    return [*kept, draw(group, chosen, generator)]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(rows.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def checked_out(commit: str) -> Generator[Path]:
    """Check out the commit in a temporary folder, with `../shared` beside it as in this checkout."""
    folder = Path(tempfile.mkdtemp(prefix="tersor-breaks-"))
    tree, shared = folder / "tree", rows.ROOT.parent / "shared"
    _git("worktree", "add", "--detach", str(tree), commit)
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    try:
        yield tree
    finally:
        _git("worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder)


def place(tree: Path, wanted: Break) -> int | None:
    """Return the number of the line to break, from 1; None if the commit has no such line, or several."""
    path = tree / wanted.file
    lines = [line.strip() for line in path.read_text().splitlines()] if path.exists() else []
    return lines.index(wanted.before) + 1 if lines.count(wanted.before) == 1 else None


@contextmanager
def broken(tree: Path, wanted: Break) -> Generator[None]:
    """Replace the line by the broken one inside the context."""
    path, number = tree / wanted.file, place(tree, wanted)
    assert number is not None
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(wanted.before, wanted.after)
    path.write_text("".join(lines))
    try:
        yield
    finally:
        path.write_text(whole)


def mirrors(tree: Path, file: str) -> list[str]:
    """Return the test files for a module: same name first, then those that import it, most mentions first."""
    module = Path(file).relative_to("src").with_suffix("")
    beside = tree / "tests" / module.relative_to("tersor").parent
    own = [beside / f"test_{name}.py" for name in (module.name, module.name.partition("_")[0])]
    dotted = ".".join(module.parts)
    known = {path: path.read_text() for path in sorted((tree / "tests").rglob("test_*.py"))}
    users = [path for path, text in known.items() if re.search(rf"\b{re.escape(dotted)}\b", text)]
    users.sort(key=lambda path: -known[path].count(module.name))
    return [str(path.relative_to(tree)) for path in dict.fromkeys([*own, *users]) if path.exists()][:_MIRRORS]


def first_failure(tree: Path, arguments: Sequence[str], limit_s: float) -> str | None:
    """Return the first failing test, "no end within ..." or "collection"; None if all pass."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*PYTEST, *arguments],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {limit_s:.0f} s"
    if done.returncode in {0, 5}:  # 5: all tests are marked slow
        return None
    told = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return told[1] if told else "collection"


def caught_by(tree: Path, wanted: Break, tests: Sequence[str], *, whole: bool) -> str | None:
    """Return the test that fails with the break and passes without it, or None.

    Args:
        tree: a checkout.
        wanted: the break.
        tests: tests to try instead of those that mirror the module, if any.
        whole: whether to try all of `make test` afterwards.
    """
    phases = {"mirror": list(tests) or mirrors(tree, wanted.file), "whole": WHOLE}
    for phase, arguments in phases.items():
        if not arguments or (phase == "whole" and not whole):
            continue
        failing_anyway: list[str] = []
        while True:
            ignored = [f"--deselect={test}" for test in failing_anyway]
            with broken(tree, wanted):
                failure = first_failure(tree, [*arguments, *ignored], _TOO_LONG_S[phase])
            if failure is None:
                break
            if "::" not in failure or first_failure(tree, [failure], _TOO_LONG_S["mirror"]) is None:
                return failure
            failing_anyway.append(failure)
    return None


def run_together(commit: str, only: Sequence[int]) -> None:
    """Try several breaks at once, of different modules, on all of `make test`: if nothing fails, none is caught."""
    chosen = [Break(**each) for each in json.loads(CHOSEN.read_text())]
    revision = _git("rev-parse", "--short=12", commit).strip()
    with rows.alone(), checked_out(revision) as tree:
        lines = {number: place(tree, chosen[number]) for number in only}
        start, failing_anyway = time.monotonic(), list[str]()
        while True:
            ignored = [f"--deselect={test}" for test in failing_anyway]
            with ExitStack() as stack:
                for number in only:
                    stack.enter_context(broken(tree, chosen[number]))
                failure = first_failure(tree, [*WHOLE, *ignored], _TOO_LONG_S["whole"])
            if failure is None or first_failure(tree, [failure], _TOO_LONG_S["mirror"]) is None:
                break
            failing_anyway.append(failure)
        seconds = round(time.monotonic() - start, 1)
    print(f"{list(only)}: {failure or 'not caught'}, {seconds:.0f} s; failing anyway: {failing_anyway}", flush=True)
    if failure is None:
        for number in only:
            numbers = {"line": lines[number], "caught": False, "by": None, "seconds": seconds, "n": 1, "spread": None}
            rows.add(RESULT, {"tested": revision, **chosen[number].identity}, numbers, [SEED])


def run(commit: str, *, whole: bool, only: Sequence[int], tests: Sequence[str]) -> None:
    """Try every break that has no row yet, and print how many were caught."""
    chosen = [Break(**each) for each in json.loads(CHOSEN.read_text())]
    revision = _git("rev-parse", "--short=12", commit).strip()
    counted = [number for number, each in enumerate(chosen) if each.equivalent is None]
    with rows.alone(), checked_out(revision) as tree:
        for number in only or counted:
            wanted = chosen[number]
            identity = {"tested": revision, **wanted.identity}
            if rows.known(RESULT, identity, anywhere=True):
                continue
            line, start = place(tree, wanted), time.monotonic()
            by = caught_by(tree, wanted, tests, whole=whole) if line else None
            seconds = round(time.monotonic() - start, 1)
            where = f"{number}: {wanted.file}:{line} {wanted.before!r} -> {wanted.after!r}"
            print(f"{where}: {by or ('not caught' if line else 'no such line')}, {seconds:.0f} s", flush=True)
            if by or whole or not line:
                caught = None if line is None else by is not None
                numbers = {"line": line, "caught": caught, "by": by, "seconds": seconds, "n": 1, "spread": None}
                rows.add(RESULT, identity, numbers, [SEED])
    identities = [{"tested": revision, **chosen[number].identity} for number in counted]
    found = [row["caught"] for row in rows.read(RESULT) if {key: row[key] for key in identities[0]} in identities]
    print(f"{revision}: {found.count(True)} of {len(counted)} caught, {found.count(None)} without the line")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    choosing = commands.add_parser("choose", help="draw breaks, and write bench/breaks.json")
    choosing.add_argument("--commits", nargs="+", default=["HEAD"], help="commits that must contain the lines")
    replacing = commands.add_parser("replace", help="set a break aside, and draw another one of the same group")
    replacing.add_argument("number", type=int, help="index of the break, from 0")
    replacing.add_argument("reason", help="why the broken line computes the same")
    running = commands.add_parser("run", help="try the breaks on a commit")
    running.add_argument("--commit", default="HEAD")
    running.add_argument(
        "--mirrors-only", action="store_true", help="write no row for breaks that the mirroring tests miss"
    )
    running.add_argument("--only", nargs="+", type=int, default=[], metavar="N", help="indices of breaks, from 0")
    running.add_argument(
        "--tests", nargs="+", default=[], help="try these tests of `make test` instead of the mirroring ones"
    )
    running.add_argument("--together", action="store_true", help="try the breaks of --only at once on all tests")
    given = parser.parse_args()
    if given.command in {"choose", "replace"}:
        if given.command == "choose":
            chosen = choose(given.commits, SEED)
        else:
            known = [Break(**each) for each in json.loads(CHOSEN.read_text())]
            chosen = replace(known, given.number, given.reason, SEED)
        CHOSEN.write_text(json.dumps([asdict(each) for each in chosen], indent=1) + "\n")
        for number, each in enumerate(chosen):
            print(f"{number:2} {each.kind:10} {each.file}: {each.before}  ->  {each.after}")
    elif given.together:
        run_together(given.commit, given.only)
    else:
        run(given.commit, whole=not given.mirrors_only, only=given.only, tests=given.tests)


if __name__ == "__main__":
    main()
