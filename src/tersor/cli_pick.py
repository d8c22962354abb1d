"""`tersor pick`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli_compress import Latencies, PickedDrop, front_tables
from tersor.cli_output import described_input, plain_console, print_json, show
from tersor.core.errors import InputError

if TYPE_CHECKING:
    from tersor.search.folder import Front
    from tersor.search.result import Choice


def pick(
    folder: Annotated[Path, typer.Argument(help="folder that `tersor compress` wrote", show_default=False)],
    max_drop: PickedDrop = None,
    latency: Latencies = None,
    size: Annotated[str | None, typer.Option(help="file size limit: 0.5MB")] = None,
    point: Annotated[str | None, typer.Option(metavar="NAME", help="name of a point, instead of limits")] = None,
    out: Annotated[Path | None, typer.Option(help="ONNX file to write; it must not exist")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON document on stdout, the rest on stderr")
    ] = False,
) -> None:
    """Choose a point of the Pareto front, without training. By default, the budget of the search is used."""
    from tersor.search.compression_budget import Budget, parse_latency, parse_size
    from tersor.search.folder import read_front
    from tersor.search.result import PickedPoint, Result

    front = read_front(folder)
    own, budget = Budget.of_numbers(front.limits), None
    if max_drop is not None or latency or size is not None:
        budget = Budget(max_drop, parse_latency(latency or []), None if size is None else parse_size(size))
    choice = Result(folder, front).pick(budget, point=point)
    if out:
        _write(choice, out)
    title = f"budget: {budget}" if budget else f"budget of the search: {own}"
    limits = [each.points for each in (budget, own) if each is not None and each.points is not None]
    _print(title, front, choice, out, allowed=next(iter(limits), None), named=point is not None, stderr=as_json)
    if as_json:
        print_json(
            PickedPoint(str(budget or own), not choice.shortfall, choice.shortfall, choice.point, out or choice.file)
        )


def _write(choice: Choice, out: Path) -> None:
    """Write the file of a choice. The same content may be there already.

    Raises:
        InputError: there is something else, or `out` cannot be written.
    """
    from tersor.core.files import sha256

    if out.is_file() and choice.file.is_file() and sha256(out) == sha256(choice.file):
        return
    if out.exists():
        raise InputError(f"{out} already exists and will not be overwritten. Choose another file, or remove it.")
    choice.export(out)


def _print(
    title: str,
    front: Front,
    choice: Choice,
    out: Path | None,
    *,
    allowed: float | None,
    named: bool,
    stderr: bool,
) -> None:
    """Print the front with the choice, and its file.

    Args:
        title: the budget.
        front: the front.
        choice: the point that was chosen.
        out: the file that was written.
        allowed: drop in points above which a warning is printed; None: the default.
        named: whether the point was chosen by its name.
        stderr: whether to print to stderr.
    """
    from tersor.search.compression_budget import DEFAULT_DROP, in_points
    from tersor.search.verdict_line import single

    console, name = plain_console(stderr=stderr), choice.point.name
    lines = [title]
    if choice.shortfall:
        lines.append(
            f"{name} does not meet the budget: {choice.shortfall}"
            if named
            else f"No point meets the budget. {name} is the closest: {choice.shortfall}"
        )
    console.print(*lines, sep="\n", soft_wrap=True)
    shown = front.points if choice.point in front.points else [*front.points, choice.point]
    show(console, *front_tables(front.model_copy(update={"points": shown, "best": name}), "chosen"))
    after, before = choice.point.test, front.point(front.original).test
    limit = DEFAULT_DROP if allowed is None else allowed
    if after is not None and before is not None and before - after > limit:
        which = (
            f"{in_points(limit)} (the default limit)" if allowed is None else f"the allowed drop of {in_points(limit)}"
        )
        lost = f"{before - after:.2f} points on the test images, more than {which}"
        console.print(f"warning: {name} loses {lost}", soft_wrap=True)
    file = f"written: {out}; it takes {described_input(out)}" if out else f"file: {choice.file}"
    exceeds = f". This file exceeds the budget: {choice.shortfall}" if choice.shortfall else ""
    console.print(*single(front), f"chosen: {name}", f"{file}{exceeds}", sep="\n", soft_wrap=True)
