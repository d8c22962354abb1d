"""Errors and warnings for users: what was given, what is possible, what to write."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Origin = Literal["recipe", "call", "search"]
"""What sets the options of a training run: a recipe, the arguments of a function, or a search (fixed options)."""


class InputError(ValueError):
    """The user's input cannot be used. The command line prints the message without a traceback and exits with 2."""


class CompressionWarning(UserWarning):
    """The result is usable but unexpected: part of it stays uncompressed, or its outputs differ."""


_ADVICE: dict[Origin, str] = {
    "recipe": " Try a smaller optimizer.learning_rate, a larger lr_schedule.warmup_epochs, or clip_norm: 1.",
    "call": " Try a smaller learning_rate.",
    "search": "",
}


class NonFiniteLoss(InputError):  # noqa: N818 - names the event
    """The loss `term` became infinite or NaN at `step` (from 1). The weights were not updated in that step.

    `term` is empty if the loss belongs to another process. `origin`: where the training options are from.
    """

    def __init__(
        self,
        step: int,
        term: str,
        value: float,
        learning_rate: float,
        last_good: str | None,
        *,
        origin: Origin = "recipe",
    ) -> None:
        saved = f" Last good checkpoint: {last_good or 'none was written'}." if origin == "recipe" else ""
        super().__init__(
            not_finite(term, value)
            if step == 1
            else f"{_named(term)} is {value} at step {step}, with a learning rate of {learning_rate:g}. The weights "
            f"were not updated in this step.{saved}{_ADVICE[origin]}"
        )
        self.step = step
        self.term = term


def _named(term: str) -> str:
    return f"the loss '{term}'" if term else "a loss in another process"


def not_finite(term: str, value: float) -> str:
    """The message for a loss that is infinite or NaN in the first step."""
    return (
        f"{_named(term)} is {value} before any update of the weights. Check how it is computed (division by 0, "
        "logarithm of 0, square root of a negative number), and the weights and images that are loaded."
    )


class NonFiniteWeights(InputError):  # noqa: N818 - names the event
    """The last step of `task` made weights infinite or NaN, which no later loss can show."""

    def __init__(self, task: str, *, origin: Origin = "recipe") -> None:
        super().__init__(f"{task}: the last step made weights infinite or NaN.{_ADVICE[origin]}")


class ProcessLost(InputError):  # noqa: N818 - names the event
    """Another process of a distributed run has died or cannot be reached."""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option most similar to `name`, or None."""
    close = difflib.get_close_matches(name, list(options), n=3, cutoff=0.6)
    swapped = [each for each in close if sorted(each) == sorted(name)]  # two letters in the wrong order
    return next(iter([*swapped, *close]), None)


def counted(number: int, noun: str) -> str:
    """`1 channel` or `3 channels`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def unknown(kind: str, name: str, options: Iterable[str], own: str = "") -> InputError:
    """Return the error for a name that is not among the `options`, with the most similar option.

    `own`: what a Python file may define instead, such as "a function that returns the network".
    """
    if own and name.endswith(".py"):
        return without_function(name, own)
    return InputError(f"unknown {kind} '{name}'.{_possible(name, options)}")


def missing_in(owner: str, kind: str, name: str, options: Iterable[str]) -> InputError:
    """Return the error for a `kind` of `owner` that is not among the `options`, with the most similar option."""
    return InputError(f"{owner} has no {kind} '{name}'.{_possible(name, options)}")


def _possible(name: str, options: Iterable[str]) -> str:
    known = sorted(options)
    similar = nearest(name, known)
    hint = f" Did you mean '{similar}'?" if similar else ""
    return f"{hint} Possible: {', '.join(known) or 'none'}."


def without_function(file: str, own: str) -> InputError:
    """Return the error for a Python file without the name of a function or class in it."""
    path = Path(file)
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        return InputError(f"there is no file '{file}'{where}. Correct the path, and write PATH:NAME; NAME is {own}.")
    defined = _defined_in(path)
    example = f"{file}:{defined[0]}" if len(defined) == 1 else f"{file}:NAME, where NAME is {own}"
    found = f" {file} defines {', '.join(defined)}." if defined else ""
    return InputError(f"'{file}' is a file. Write {example}.{found}")


def _defined_in(file: Path) -> list[str]:
    """The public functions and classes of a Python file, which is not executed."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [each.name for each in tree.body if isinstance(each, kinds) and not each.name.startswith("_")]
