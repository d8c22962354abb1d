"""Time of each node and layer of a model file, from the runtime's own profiler. Needs numpy, never torch.

Both runtimes fuse nodes and name a fused node after one of its parts. In files written by `deploy/onnx.py`,
convolutions and matrix products are named after the path of their module, so that the time of a layer is that of the
nodes named after it. Rounding, additions and layout changes belong to no layer.

Profiling takes time: ONNX Runtime counts whole microseconds and spends some on each node, so that the sum over many
short nodes exceeds the latency. There, shares are more meaningful than milliseconds.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.core.errors import InputError
from tersor.core.machine import default_threads
from tersor.evaluation.session import Array, load_runtime, onnxruntime_options, openvino_compiled, openvino_config

_WARMUP_RUNS = 3
_RUNS = 20
_PRODUCTS = {"Conv", "Gemm", "MatMul"}
_FUSED = {"Add", "Clip", "Relu"}
_NODE_TIME_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """Time of one node.

    Attributes:
        name: the runtime's name: a layer's path, sometimes with a suffix ("layer1.0.conv1_token_12",
            "conv1/WithoutBiases").
        kind: the executed operator: "QLinearConv", "Convolution".
        ms: median over the runs, in milliseconds.
    """

    name: str
    kind: str
    ms: float


def node_times(
    path: Path, runtime: str, batch: Array, *, precision: str | None = None, runs: int = _RUNS
) -> list[NodeTime]:
    """Time of each executed node, in the order of execution.

    Args:
        path: a file that `open_session` opens.
        runtime: "onnxruntime" or "openvino".
        batch: input images (N, C, H, W).
        precision: as for `open_session`.
        runs: number of runs for the medians, after a few uncounted ones.
    """
    module = load_runtime(runtime)
    profiled = _onnxruntime if runtime == "onnxruntime" else _openvino
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for number, run in enumerate(profiled(module, path, batch, precision, _WARMUP_RUNS + runs)):
        if number < _WARMUP_RUNS:
            continue
        totals: Counter[tuple[str, str]] = Counter()
        for node in run:  # OpenVINO may report a node in several lines
            totals[node.name, node.kind] += node.ms  # type: ignore[assignment]
        for key, ms in totals.items():
            times[key].append(ms)
    return [NodeTime(name, kind, float(np.median(values))) for (name, kind), values in times.items()]


def profile(
    path: Path,
    runtime: str,
    batch: Array,
    layers: Mapping[str, str],
    *,
    precision: str | None = None,
    runs: int = _RUNS,
) -> dict[str, Any]:
    """Node times by operator and by layer, as plain values.

    Args:
        path, runtime, batch, precision, runs: as for `node_times`.
        layers: path of a module -> the layer that its time counts for. The module is the layer itself, or the BatchNorm
            after it: the folded node may have either name.

    Returns:
        `ms`: total of all nodes. `kinds`: `kind`, `nodes` and `ms` of each operator, slowest first. `layers`:
        milliseconds by layer.
    """
    times = node_times(path, runtime, batch, precision=precision, runs=runs)
    names = _layers_by_name(path, layers)
    kinds: defaultdict[str, list[float]] = defaultdict(list)
    by_layer: defaultdict[str, float] = defaultdict(float)
    for node in times:
        kinds[node.kind].append(node.ms)
        layer = layer_of_node(node.name, names)
        if layer is not None:
            by_layer[layer] += node.ms
    ordered = sorted(kinds.items(), key=lambda entry: (-sum(entry[1]), entry[0]))
    return {
        "ms": sum(node.ms for node in times),
        "kinds": [{"kind": kind, "nodes": len(values), "ms": sum(values)} for kind, values in ordered],
        "layers": dict(by_layer),
    }


def layer_of_node(node: str, names: Mapping[str, str]) -> str | None:
    """The layer that a node is named after: that of the longest of `names` that the node's name starts with."""
    parts = [match.start() for match in re.finditer(r"[^0-9A-Za-z]", node)] + [len(node)]
    return next((names[node[:end]] for end in reversed(parts) if node[:end] in names), None)


def _layers_by_name(path: Path, layers: Mapping[str, str]) -> dict[str, str]:
    """Name of a node or of its output -> layer. ONNX Runtime names nodes with a changed layout after their output."""
    import onnx  # here, because it is slow to import

    names: dict[str, str] = {}
    for node in onnx.load(str(path)).graph.node:
        module = node.name if node.name in layers else node.name.rpartition(".")[0]
        layer = layers.get(module) if node.op_type in _PRODUCTS else None
        if layer is not None:
            names[node.name] = layer
        elif node.op_type in _FUSED:
            layer = next((names[value] for value in node.input if value in names), None)
        if layer is not None:
            names[node.output[0]] = layer
    return names


def _onnxruntime(ort: Any, path: Path, batch: Array, _precision: str | None, runs: int) -> Iterator[list[NodeTime]]:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime_options(ort, default_threads())
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "nodes")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for _ in range(runs):
            session.run(None, {name: batch})
        events = _events(Path(session.end_profiling()))
    nodes: list[NodeTime] = []
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_NODE_TIME_SUFFIX):
            kind = event["args"]["op_name"]
            nodes.append(NodeTime(event["name"].removesuffix(_NODE_TIME_SUFFIX), kind, event["dur"] / 1000))
        elif event["name"] == "model_run":
            yield nodes
            nodes = []


def _events(path: Path) -> list[Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f"onnxruntime could not write its whole profile to {path.parent.parent}. Free disk space. To continue, "
            "repeat the same call; for `tersor.run`, add resume=True (`--resume`)."
        ) from error


def _openvino(ov: Any, path: Path, batch: Array, precision: str | None, runs: int) -> Iterator[list[NodeTime]]:
    config = openvino_config(precision, default_threads()) | {"PERF_COUNT": True}
    request = openvino_compiled(ov, str(path), config).create_infer_request()
    for _ in range(runs):
        request.infer([batch], share_inputs=True)
        yield [
            NodeTime(node.node_name, node.node_type, node.real_time.total_seconds() * 1000)
            for node in request.get_profiling_info()
            if node.status == ov.ProfilingInfo.Status.EXECUTED
        ]
