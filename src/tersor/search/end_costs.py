"""Measures, at the start of a search, how long its last steps take, so that the plan can reserve this time."""

from __future__ import annotations

import copy
from pathlib import Path

from tersor.evaluation.multiply_peak import multiply_peaks
from tersor.evaluation.session import open_session
from tersor.report.analysis.evidence import layers_by_module
from tersor.search.search_context import Search


def measure_end(search: Search, file: Path) -> None:
    """Measure the peak throughput of the machine, and how many seconds it takes to name layers and to open files.

    The peaks are measured once per process, so that the end of the search has them already.

    Args:
        search: a search with its free baselines.
        file: the file of the original.
    """
    state = search.folder.state
    multiply_peaks(sorted({point.runtime for point in state.baselines}))
    if state.costs.open:
        return
    with search.timed("layers"):
        folded_layers(search)
    with search.timed("open"):
        for _ in ("to read its batch size", *search.measurement.batch_sizes):
            open_session(file, search.runtime)


def folded_layers(search: Search) -> dict[str, str]:
    """The original's layers, by their own path and by the path of the BatchNorm folded into each."""
    original = copy.deepcopy(search.bench.experiment.model).cpu().float().eval()
    return layers_by_module(original, next(iter(search.bench.validation)).only_images[:2])
