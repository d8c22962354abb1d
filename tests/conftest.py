"""How the tests share a machine: one thread in each of several workers, the longest files first, no deadline."""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext

import pytest
from hypothesis import settings

if os.environ.get("PYTEST_XDIST_WORKER"):
    # before torch is imported: if the workers use all cores, a second thread in each makes small operations ten times
    # slower, as each operation waits for a free core
    os.environ["OMP_NUM_THREADS"] = "1"

PLUGINS = ("decomposed_once", "onnx_files", "recorded_once", "captured_once")  # the last one imports the others

# the time of one example is not meaningful on a busy machine
settings.register_profile("tersor", deadline=None)
settings.load_profile("tersor")


def pytest_configure(config: pytest.Config) -> None:
    """Begin where tests run: the process that starts the workers would only import torch, which takes seconds.

    The peak throughput is measured with one run: no test needs its value.
    """
    if getattr(config.option, "numprocesses", None):
        return
    for name in PLUGINS:
        config.pluginmanager.import_plugin(name)
    from tersor.evaluation import multiply_peak

    multiply_peak._LEAST_RUNS, multiply_peak._SECONDS = 1, 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, so that no worker still runs one of them at the end."""
    items.sort(key=lambda item: "/laws/" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Collect garbage less often, and only objects of the tests: the imported libraries have a million objects."""
    from tersor.pruning import channel_groups

    # it counts the frozen objects, which takes 10 ms with all those of the libraries; they are frozen for all tests
    channel_groups._existing_objects_not_collected = nullcontext
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """Collect garbage once: pytest does so ten times at the end, which takes seconds with all cached objects."""
    gc.collect()
    gc.freeze()
