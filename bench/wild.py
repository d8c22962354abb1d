"""Networks that others wrote, with random weights: what tersor does for each, beside ONNX Runtime's own quantization.

A row has:
- whether the network is captured, or the message; the seconds
- the share of the MACs in integers, and the largest operators in float
- the distance from the float network of the int8 file, quantized for each runtime, and of `quantize_static`'s file, in
  both runtimes: the mean absolute difference of the outputs, relative to their mean absolute value
- the latency of the float file and of these two, at batch size 1 in ONNX Runtime
- the share of the MACs that remains if half are to be removed, and the seconds
- whether the pruned network trains, and whether it is the same after it is saved and loaded

Every network runs in its own process. The packages: `pip install -e '.[bench,wild]'`.

    python bench/wild.py [--only PATTERN] [--seconds 900]
    python bench/wild.py --table
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import rows
from wild_networks import NETWORKS

RESULT = "wild"
SEED = 0
IMAGES = 8
LATENCY_SECONDS = 6.0


def trained_like(model: Any) -> Any:
    """Draw factors and statistics that training would have moved, in eval mode."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.std() < 1e-3:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def built(name: str) -> tuple[Any, Any]:
    """The network, and images for it."""
    import torch

    torch.manual_seed(SEED)
    make, size = NETWORKS[name]
    return trained_like(make()), torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(SEED))


def flat(outputs: Any) -> list[Any]:
    """All floating-point tensors in the outputs of a network."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return [each.detach() for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.is_floating_point()]


def distance(found: list[Any], expected: list[Any]) -> float:
    """The largest relative mean difference over the outputs."""
    import torch

    pairs = zip(found, expected, strict=True)
    return max(float((torch.as_tensor(a) - b).abs().mean() / b.abs().mean().clamp(min=1e-12)) for a, b in pairs)


def measured(name: str) -> Iterator[dict[str, Any]]:
    """Yield the measurements of one network, part by part."""
    from tersor.core.errors import InputError
    from tersor.graph.capture import capture

    model, images = built(name)
    begun = time.perf_counter()
    try:
        graph = capture(model, images)
    except InputError as error:
        yield {"captured": False, "message": str(error)}
        return
    yield {"captured": True, "capture_seconds": round(time.perf_counter() - begun, 2)}
    lost = len(model.state_dict().keys() - graph.state_dict().keys())
    yield {"keys_lost": lost}
    yield quantized(model, images)
    yield pruned(name, model, images)


def quantized(model: Any, images: Any) -> dict[str, Any]:
    """Quantize to 8 bits, export, and compare with the float file and `quantize_static`."""
    import peers
    import tersor
    from tersor.core.errors import InputError
    from tersor.evaluation.latency import measure_latency
    from tersor.evaluation.session import open_session
    from tersor.quantization.integer_coverage import integer_coverage

    begun = time.perf_counter()
    network = tersor.quantize(model, [images])
    found: dict[str, Any] = {"quantize_seconds": round(time.perf_counter() - begun, 1)}
    covered = integer_coverage(network, images)
    found["integers"] = round(covered.share, 4)
    found["in_float"] = [f"{each.name} ({each.kind}, {each.share:.1%})" for each in covered.operators[:3]]
    expected = flat(model(images))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("float", "int8", "quantize_static")}
        tersor.export(model, images, files["float"])
        tersor.export(network, images, files["int8"])
        try:
            peers.onnxruntime_static(files["float"], images, files["quantize_static"])
        except Exception as error:
            found["quantize_static_failed"] = str(error)[:200]
            del files["quantize_static"]
        found["bytes"] = {name: path.stat().st_size for name, path in files.items()}
        for_openvino = Path(folder) / "openvino.onnx"
        try:
            tersor.export(
                tersor.quantize(model, [images], runtime="openvino"), images, for_openvino, runtime="openvino"
            )
        except InputError as error:
            found["openvino_refused"] = str(error)[:300]
        for runtime in ("onnxruntime", "openvino"):
            for kind in files.keys() - {"float"}:
                path = for_openvino if (kind, runtime) == ("int8", "openvino") else files[kind]
                if path.exists():
                    found |= compared(kind, path, runtime, images.numpy(), expected)
        openers = {name: partial(open_session, path, "onnxruntime") for name, path in files.items()}
        timings = measure_latency(openers, images[:1].numpy(), batch_sizes=(1,), seconds=LATENCY_SECONDS)
        found["latency_ms"] = {name: round(timings.spread(name, 1).median, 4) for name in files}
    return found


def compared(kind: str, path: Path, runtime: str, images: Any, expected: list[Any]) -> dict[str, Any]:
    """The distance of a file from the float network; a process of its own runs it, since a runtime can crash."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as processes:
            outputs, place = processes.submit(outputs_of, path, runtime, images).result()
    except BrokenProcessPool:
        return {f"{kind}_failed_{runtime}": "the process crashed"}
    return {f"{kind}_distance_{runtime}": round(distance([outputs], [expected[place]]), 5)}


def outputs_of(path: Path, runtime: str, images: Any) -> tuple[Any, int]:
    """The outputs of a file for images, and their place among the outputs of the network."""
    from tersor.evaluation.session import open_session

    session = open_session(path, runtime)
    return session.run(images), session.logits or 0


def pruned(name: str, model: Any, images: Any) -> dict[str, Any]:
    """Remove half of the MACs, train one step, save and load."""
    import torch

    import tersor
    from tersor.core.errors import InputError
    from tersor.evaluation.costs import costs

    before, begun = costs(model, images[:1]).macs, time.perf_counter()
    try:
        network = tersor.prune(model, images, keep_macs=0.5, round_to=1)
    except InputError as error:
        return {"macs_left": 1.0, "prune_message": str(error)[:400]}
    found = {
        "prune_seconds": round(time.perf_counter() - begun, 1),
        "macs_left": round(costs(network, images[:1]).macs / before, 4),
    }
    with tempfile.TemporaryDirectory() as folder:
        tersor.save(network, Path(folder) / "pruned")
        again = tersor.load(built(name)[0], Path(folder) / "pruned")
        found["same_after_loading"] = distance(flat(again(images)), flat(network.eval()(images))) < 1e-6
    losses = [each.square().mean() for each in flat_with_gradients(network.train()(images))]
    torch.stack(losses).sum().backward()
    gradients = [each.grad for each in network.parameters() if each.grad is not None]
    found["trains"] = bool(gradients) and all(bool(torch.isfinite(each).all()) for each in gradients)
    return found


def flat_with_gradients(outputs: Any) -> list[Any]:
    """All tensors in the outputs that have a gradient."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return [each for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.requires_grad]


def apart(name: str, seconds: float) -> dict[str, Any]:
    """Measure in a separate process; `failed` holds the error, if any."""
    command = [sys.executable, __file__, "--task", "--only", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        output, error = done.stdout, (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        output, error = (expired.stdout or b"").decode(), f"more than {seconds:.0f} seconds"
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if error:
        found["failed"] = ([line for line in error.strip().splitlines() if line.strip()] or ["?"])[-1][:300]
    return found


def show() -> None:
    """Print the shares that `docs/benchmarks.md` quotes, and each network that misses one."""
    found = rows.read(RESULT)
    captured = [row for row in found if row.get("captured")]
    checks = {
        "captured": (found, lambda row: row.get("captured") is True),
        "at least 95 % of the MACs in integers": (captured, lambda row: row.get("integers", 0) >= 0.95),
        "at most 0.55 of the MACs left": (captured, lambda row: row.get("macs_left", 1) <= 0.55),
        "pruned in at most 30 s": (captured, lambda row: row.get("prune_seconds", 1e9) <= 30),
        "a training step after pruning": (captured, lambda row: row.get("trains") is True),
        "the same after saving and loading": (captured, lambda row: row.get("same_after_loading") is True),
        "no error": (found, lambda row: "failed" not in row),
    }
    for what, (of, check) in checks.items():
        missed = [row["network"] for row in of if not check(row)]
        print(f"{what}: {len(of) - len(missed)} of {len(of)}; not {', '.join(missed) or 'any'}")
    for peer in ("float", "quantize_static"):
        times = [row["latency_ms"] for row in captured if peer in row.get("latency_ms", {})]
        if times:
            ratios = [each["int8"] / each[peer] for each in times]
            print(f"latency over {peer}: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def main() -> None:
    """Write one row for each network that has none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern of library/name")
    parser.add_argument("--seconds", type=float, default=900, help="time limit for each network")
    parser.add_argument("--table", action="store_true", help="print the summary of the rows")
    parser.add_argument("--task", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        show()
    elif options.task:
        warnings.simplefilter("ignore")
        for part in measured(options.only):
            print(json.dumps(part), flush=True)
    else:
        with rows.alone():
            rows.commit()
            for name in NETWORKS:
                if fnmatchcase(name, options.only) and not rows.known(RESULT, {"network": name}, anywhere=True):
                    found = apart(name, options.seconds)
                    rows.add(RESULT, {"network": name}, {"n": 1, "spread": None, **found}, [SEED])
                    print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
