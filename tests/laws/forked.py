"""New processes, forked from one that has imported torch and exported a network, which saves most of their time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["killed_child"])


def start(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Call a function of a module of this folder in a new process."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the imports of the process that forks
    try:
        child = _FORKS.Process(target=function, args=arguments)
        child.start()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({} if before is None else {"PYTHONPATH": before})
    return child
