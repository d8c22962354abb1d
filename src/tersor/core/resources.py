"""What the machine lacks, in one message: memory, or a disk that can be written to."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tersor.core.errors import InputError

# torch says it on a processor by a RuntimeError, on an accelerator by one of its own; oneDNN and runtimes in words
_OUT_OF_MEMORY = re.compile(
    r"not enough memory|out of memory|can(?:'|no)t allocate memory|bad_alloc|bad allocation|failed to allocate memory",
    re.IGNORECASE,
)

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


@contextmanager
def enough_memory(remedy: str) -> Generator[None]:
    """While something may take more memory than there is.

    Args:
        remedy: what to write; a sentence.

    Raises:
        InputError: there was not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        reason = (str(error).strip().splitlines() or ["MemoryError"])[0][:200]
        raise InputError(f"there is not enough memory: {reason} {remedy}") from error


def smaller_batch(batch_size: int, accumulate: int) -> str:
    """What to write where a training takes more memory than there is."""
    if batch_size == 1:
        return "The batch_size is 1 already: use smaller images (data.image_size), or a smaller network."
    return (
        f"The batch_size is {batch_size}: lower it. batch_size: {batch_size // 2} with accumulate: {2 * accumulate} "
        "takes steps over as many images."
    )


@contextmanager
def writable(out: Path) -> Generator[None]:
    """While `out` and what lies beside it are written.

    Args:
        out: what comes of it; what is written for it meanwhile has its name within its own.

    Raises:
        InputError: there is no room, the disk is read-only or fails, or a file may not be written.
    """
    try:
        yield
    except OSError as error:
        of_out = isinstance(error, shutil.Error) or out.name in str(error.filename)
        if error.errno not in _REFUSED and not of_out:
            raise
        raise InputError(
            f"{out} could not be written: {error}. Nothing is left half-written. Make room, or name another folder. "
            "A run can be continued with --resume."
        ) from error
