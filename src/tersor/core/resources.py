"""One message for missing resources: not enough memory, or a disk that cannot be written to."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tersor.core.errors import InputError, Origin

# torch raises RuntimeError on CPUs and its subclass OutOfMemoryError on accelerators; oneDNN and runtimes vary
_OUT_OF_MEMORY = re.compile(
    r"not enough memory|out of memory|can(?:'|no)t allocate memory|bad_alloc|bad allocation|failed to allocate memory",
    re.IGNORECASE,
)

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error was caused by a lack of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


@contextmanager
def enough_memory(remedy: str) -> Generator[None]:
    """Turn out-of-memory errors into one message.

    Args:
        remedy: what the user can do; a sentence.

    Raises:
        InputError: there was not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["MemoryError"])[0][:200]
        raise InputError(f"there is not enough memory ({reason.rstrip('.')}). {remedy}") from error


def less_memory(origin: Origin, batch_size: int, accumulate: int) -> str:
    """Return the remedy for a training run that needs too much memory; `origin` is where its options are from."""
    if origin == "call":
        return "Pass a loader with a smaller batch size."
    if origin == "search":
        return (
            "Search in another folder with smaller images (image_size, `--image-size`). If the search has workers, use "
            "fewer (`--workers`)."
        )
    if batch_size == 1:
        return "The batch_size is already 1: use smaller images (data.image_size) or a smaller network."
    same = "about the same" if batch_size % 2 else "the same"
    return (
        f"The batch_size is {batch_size}. Write a smaller one. To keep {same} number of images per step, write "
        f"batch_size: {batch_size // 2} and accumulate: {2 * accumulate}."
    )


@contextmanager
def writable(out: Path) -> Generator[None]:
    """Turn errors of writing `out` into one message.

    Args:
        out: the result; the names of its temporary files contain its name.

    Raises:
        InputError: the disk is full, read-only or failing, or permission is denied.
    """
    try:
        yield
    except OSError as error:
        of_out = isinstance(error, shutil.Error) or out.name in str(error.filename)
        if error.errno not in _REFUSED and not of_out:
            raise
        raise InputError(
            f"{out} could not be written: {error}. Free disk space and check the permissions. To continue, repeat the "
            "same call; for `tersor.run`, add resume=True (`--resume`). To start again, choose another folder."
        ) from error
