"""What a user did that cannot be done, in one message: what was given, what is possible, what to write."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something a user gave cannot be used. The command line prints it and exits with 2, without a traceback."""


class CompressionWarning(UserWarning):
    """The result is usable, and not what its user expects: part of it stays uncompressed, or its outputs differ."""


class NonFiniteLoss(InputError):  # noqa: N818 - what happened, not that it is an error
    """A loss became infinite or NaN, at `step` (from 1), in the term named `term`. That step moved no weight."""

    def __init__(self, step: int, term: str, value: float, learning_rate: float, last_good: str | None) -> None:
        super().__init__(
            f"the loss '{term}' is {value} at step {step}, with a learning rate of {learning_rate:g}; this step has "
            f"not moved the weights. Last good checkpoint: {last_good or 'none was written'}. Try a smaller "
            "learning_rate, some warmup_epochs, or clip_norm."
        )
        self.step = step
        self.term = term


class NonFiniteWeights(InputError):  # noqa: N818 - what happened, not that it is an error
    """The last step of `task` has left weights that are infinite or NaN; no loss after it could tell."""

    def __init__(self, task: str) -> None:
        super().__init__(
            f"{task}: the last step has left weights that are infinite or NaN. Try a smaller learning_rate, some "
            "warmup_epochs, or clip_norm."
        )


def nearest(given: str, options: Iterable[str]) -> str | None:
    """The option that `given` was most likely meant to be, or None."""
    close = difflib.get_close_matches(given, list(options), n=1, cutoff=0.6)
    return close[0] if close else None


def unknown(kind: str, given: str, options: Iterable[str]) -> InputError:
    """An error for a name that is not among the `options`, with the nearest of them."""
    known = sorted(options)
    meant = nearest(given, known)
    hint = f" Did you mean '{meant}'?" if meant else ""
    return InputError(f"unknown {kind} '{given}'.{hint} Possible: {', '.join(known) or 'none'}.")
