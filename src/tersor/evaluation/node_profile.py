"""Where the time of a file goes, by the runtime's own profile of its nodes. Needs numpy, never torch.

Both runtimes fuse nodes before they run them and name what is left after the nodes that it came from. Convolutions and
matrix products of our files bear the path of their module (`onnx.py`), so that the time of a layer is what is named
after it. Rounding, additions and changes of layout belong to no layer.

Being watched takes time: ONNX Runtime counts whole microseconds and spends some on each node that it notes down, so
that the nodes' sum is more than the latency where nodes are short. Shares tell more than milliseconds there.
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

_WARMING = 3
_RUNS = 20
_PRODUCTS = {"Conv", "Gemm", "MatMul"}
_FUSED = {"Add", "Clip", "Relu"}
_TIME_ENDS = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """What one node took.

    Attributes:
        name: the runtime's: a layer's path, or nearly ("layer1.0.conv1_token_12", "conv1/WithoutBiases").
        kind: the operator that was run: "QLinearConv", "Convolution".
        ms: median over the runs, in milliseconds.
    """

    name: str
    kind: str
    ms: float


def node_times(
    path: Path, runtime: str, batch: Array, *, precision: str | None = None, runs: int = _RUNS
) -> list[NodeTime]:
    """What each node takes that the runtime runs, in the order of running.

    Args:
        path: a file that `open_session` opens.
        runtime: "onnxruntime" or "openvino".
        batch: images (N, C, H, W) as the file takes them.
        precision: as for `open_session`.
        runs: how many the medians are over, after a few that are not counted.
    """
    module = load_runtime(runtime)
    profiled = _onnxruntime if runtime == "onnxruntime" else _openvino
    taken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for number, run in enumerate(profiled(module, path, batch, precision, _WARMING + runs)):
        if number < _WARMING:
            continue
        of_this_run: Counter[tuple[str, str]] = Counter()
        for node in run:  # OpenVINO may tell of one node in several lines
            of_this_run[node.name, node.kind] += node.ms  # type: ignore[assignment]
        for key, ms in of_this_run.items():
            taken[key].append(ms)
    return [NodeTime(name, kind, float(np.median(values))) for (name, kind), values in taken.items()]


def profile(
    path: Path, runtime: str, batch: Array, layers: Mapping[str, str], *, precision: str | None = None
) -> dict[str, Any]:
    """Node times summed up by operator and by layer, as plain values.

    Args:
        path, runtime, batch, precision: as for `node_times`.
        layers: path of a module -> the layer that its time counts for: a layer's own, and that of the BatchNorm which
            was folded into it and left it its name.

    Returns:
        `ms`: of all nodes. `kinds`: of each operator its `kind`, `nodes` and `ms`, the costliest first. `layers`: of
        each layer that has nodes its milliseconds.
    """
    times = node_times(path, runtime, batch, precision=precision)
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
    """The layer that a runtime's node is named after: the longest of `names` that it begins with."""
    parts = [match.start() for match in re.finditer(r"[^0-9A-Za-z]", node)] + [len(node)]
    return next((names[node[:end]] for end in reversed(parts) if node[:end] in names), None)


def _layers_by_name(path: Path, layers: Mapping[str, str]) -> dict[str, str]:
    """Name of a node or of the value that it gives -> layer. ONNX Runtime names what it lays out anew after values."""
    import onnx  # here, because it takes longer to import than all the rest

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
        if event.get("cat") == "Node" and event["name"].endswith(_TIME_ENDS):
            kind = event["args"]["op_name"]
            nodes.append(NodeTime(event["name"].removesuffix(_TIME_ENDS), kind, event["dur"] / 1000))
        elif event["name"] == "model_run":
            yield nodes
            nodes = []


def _events(path: Path) -> list[Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f"onnxruntime could not write all of its profile to {path.parent.parent}. Make room there, then go on with "
            "--resume."
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
