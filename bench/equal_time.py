"""The main benchmark: a trained ResNet-56 with about half of its MACs and 8 bits, after equal training time.

All contenders get the same network, images, augmentation, optimizer, schedule and training time. The training time is
that of the recipe: the seconds per step are measured first, interleaved, and a contender with a cheaper step takes more
steps. A contender counts only at the requested MACs. Latency is interleaved; a ratio compares times of the same round,
and below 1 tersor is faster.

    tersor                recipes/cifar10-resnet56.yaml: channels removed, the original as the teacher, PTQ
    torch-pruning         its MagnitudePruner, restricted to the inner channels by hand, fine-tuned on the labels, then
                          ONNX Runtime's quantize_static and NNCF
    original, trained on  control: nothing removed, trained on the labels, PTQ; shows the effect of the training alone
    resnet20, distilled   control: the trained ResNet-20 with the ResNet-56 as its teacher, PTQ
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peers
import rows
import tables
from images import MEAN, SHARED, STD, TRAINED, cifar, folder, normalised
from tersor import recipe as recipes
from tersor.checkpoint.store import Checkpoints
from tersor.checkpoint.structure import rebuild
from tersor.core.target import Runtime, Target
from tersor.data import Batches
from tersor.deploy.onnx import export
from tersor.evaluation.costs import costs
from tersor.evaluation.latency import measure_latency, size_bytes
from tersor.evaluation.scoring import file_predictions, network_score
from tersor.evaluation.session import open_session
from tersor.methods.ptq import PTQ
from tersor.methods.soft_targets import SoftTargets
from tersor.pipeline.run import run
from tersor.recipe import Recipe, Stage
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.loop import TrainingResult, fit
from tersor.training.method import chain

RESULT = "equal_time"
OURS = "tersor"
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
PACE_STEPS, PACE_ROUNDS = 15, 3
SUBJECT = TRAINED["resnet56"]


def recipe(seed: int = 0) -> Recipe:
    """Return the recipe with its data, weights and seed."""
    weights = SHARED / "models" / "resnet56-cifar10-jpeg.safetensors"
    given = [f"data.folder={folder()}", f"model.weights={weights}", f"seed={seed}"]
    return recipes.read(rows.ROOT / "recipes" / "cifar10-resnet56.yaml", given)


def stage() -> Stage:
    """Return the recipe's first stage: how it trains and what it removes."""
    return recipe().stages[0]


def batches(seed: int, size: int = 128) -> Batches:
    """Return shuffled and augmented training batches, as in the recipe."""
    return Batches(cifar().train, size, mean=MEAN, std=STD, shuffle=True, seed=seed, augment="crop_flip")


def pruned_by_tersor(seed: int, steps: int) -> Attachment:
    """Attach the methods of the recipe's first stage and run `begin`."""
    model = SUBJECT.network()
    calm = Batches(cifar().train, 64, mean=MEAN, std=STD, shuffle=True, seed=seed)
    attached = chain(stage().methods, model, AttachContext(data=calm, teacher=copy.deepcopy(model), steps=steps))
    attached.begin()
    return attached


def torch_pruned(ratio: float, round_to: int) -> nn.Module:
    """Prune the ResNet-56 with torch-pruning's MagnitudePruner."""
    import torch_pruning

    model = SUBJECT.network()
    example = torch.zeros(1, 3, 32, 32)
    inner = {
        module.conv1 for name, module in model.named_modules() if name.startswith("layer") and hasattr(module, "conv1")
    }
    ignored: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear) and module not in inner
    ]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        round_to=round_to,
        ignored_layers=ignored,
    )
    pruner.step()
    return model


def pruned_by_torch_pruning(_seed: int, _steps: int) -> Attachment:
    """Remove half of the inner channels."""
    return Attachment(torch_pruned(0.5, 8))


def distilled_resnet20(_seed: int, _steps: int) -> Attachment:
    """Return the smaller network, trained beforehand like the ResNet-56."""
    return SoftTargets().attach(TRAINED["resnet20"].network(), AttachContext(teacher=SUBJECT.network()))


@dataclass(frozen=True)
class Contender:
    """A way to compress the ResNet-56.

    Attributes:
        name: its name in the rows.
        begun: function of seed and steps that returns what is trained.
        taught: whether the ResNet-56 is the teacher.
        pruned: whether it must reach the recipe's MACs.
        by_peers: whether the peers' quantizers make the artifacts, instead of tersor's PTQ.
    """

    name: str
    begun: Callable[[int, int], Attachment]
    taught: bool
    pruned: bool
    by_peers: bool = False


CONTENDERS = (
    Contender(OURS, pruned_by_tersor, taught=True, pruned=True),
    Contender("torch-pruning", pruned_by_torch_pruning, taught=False, pruned=True, by_peers=True),
    Contender("original, trained on", lambda _seed, _steps: Attachment(SUBJECT.network()), taught=False, pruned=False),
    Contender("resnet20, distilled", distilled_resnet20, taught=True, pruned=False),
)


def trained(contender: Contender, seed: int, steps: int) -> tuple[nn.Module, TrainingResult]:
    """Return the network after `steps` of the recipe's training."""
    attached = contender.begun(seed, steps)
    teacher = SUBJECT.network() if contender.taught else None
    fitted = fit(attached, batches(seed), stage(), steps=steps, teacher=teacher, seed=seed)
    attached.finish()
    return attached.model, fitted


def run_by_tersor(seed: int, out: Path) -> tuple[nn.Module, float, str]:
    """Run the recipe as `tersor run` does; return the trained network, the seconds and the precision."""
    run(recipe(seed), data=cifar(), out=out)
    first = json.loads((out / "numbers.json").read_text())["stages"][0]
    end = Checkpoints(out / "checkpoints").end_of(1)
    assert end is not None
    model = rebuild(SUBJECT.network(), end.structure())
    model.load_state_dict(end.network())
    return model.eval(), first["training_seconds"], first["precision"]


def pace() -> dict[str, float]:
    """Return the seconds per step of each contender, measured once on this machine."""
    identities = {each.name: {"kind": "pace", "contender": each.name, "model": SUBJECT.name} for each in CONTENDERS}
    if not all(rows.known(RESULT, identity) for identity in identities.values()):
        seconds: dict[str, list[float]] = {each.name: [] for each in CONTENDERS}
        for _ in range(PACE_ROUNDS):
            for each in CONTENDERS:
                seconds[each.name].append(trained(each, 0, PACE_STEPS)[1].seconds / PACE_STEPS)
        for name, identity in identities.items():
            median = statistics.median(seconds[name])
            spread = rows.spread(seconds[name])
            rows.add(RESULT, identity, {"seconds_a_step": median, "n": PACE_ROUNDS, "spread": spread}, [0])
            print(f"{name}: {median:.3f} s per step", flush=True)
    here = rows.machine()
    found = {row["contender"]: row for row in rows.read(RESULT) if row["kind"] == "pace" and row["machine"] == here}
    return {name: found[name]["seconds_a_step"] for name in identities}


def artifacts(contender: Contender, seed: int, steps: int) -> Path:
    """Return a folder with an artifact for each runtime and the training record; create it if it is missing."""
    made = folder().parent / "equal_time" / f"{contender.name.replace(', ', '-').replace(' ', '-')}-{seed}-{steps}"
    if made.exists():
        return made
    made.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        partial = Path(scratch) / made.name
        partial.mkdir()
        if contender.name == OURS:
            model, seconds, precision = run_by_tersor(seed, partial / "run")
        else:
            model, fitted = trained(contender, seed, steps)
            seconds, precision = fitted.seconds, fitted.precision
        _write_artifacts(contender, model, seed, partial)
        test = Batches(cifar().test, 500, mean=MEAN, std=STD)
        spent, before = (costs(each, torch.zeros(1, 3, 32, 32)) for each in (model, SUBJECT.network()))
        if contender.pruned:
            assert spent.macs <= before.macs / 1.9, f"{contender.name}: {before.macs / spent.macs:.2f} times fewer MACs"
        seen = {
            "float_accuracy": network_score(model, test),
            "macs": spent.macs,
            "macs_ratio": before.macs / spent.macs,
            "parameters": spent.parameters,
            "steps": steps,
            "training_seconds": seconds,
            "precision_of_training": precision,
        }
        (partial / "seen.json").write_text(json.dumps(seen))
        partial.rename(made)
    return made


def _write_artifacts(contender: Contender, model: nn.Module, seed: int, made: Path) -> None:
    images = SUBJECT.calibration(seed)
    float32 = export(model, images, made / "fp32.onnx")
    if contender.by_peers:
        peers.onnxruntime_static(float32, images, made / "onnxruntime.onnx")
        peers.onnxruntime_static(float32, images, made / "onnxruntime-7-bits.onnx", reduce_range=True)
        peers.nncf_post_training(float32, images, made / "openvino.xml")
        return
    for runtime in RUNTIMES:
        attached = PTQ().attach(
            copy.deepcopy(model), AttachContext(data=images.split(50), target=Target(runtime=runtime))
        )
        attached.begin()
        export(attached.model, images, made / f"{runtime}.onnx")


def artifact(made: Path, runtime: Runtime) -> Path:
    """Return the path of the file for `runtime`."""
    return next(made / f"{runtime}{suffix}" for suffix in (".onnx", ".xml") if (made / f"{runtime}{suffix}").exists())


def report_accuracy(contender: Contender, made: Path, seed: int, versions: dict[str, str]) -> None:
    """Write a row for each runtime: accuracy on all test images, points lost, bytes, MACs."""
    images, labels = normalised(cifar().test), cifar().test.targets.numpy()
    seen = json.loads((made / "seen.json").read_text())
    files: list[tuple[Runtime, Path, str]] = [(runtime, artifact(made, runtime), "int8") for runtime in RUNTIMES]
    if (made / "onnxruntime-7-bits.onnx").exists():
        files.append(("onnxruntime", made / "onnxruntime-7-bits.onnx", "int8, weights of 7 bits"))
    for runtime, file, kind in files:
        identity = {"kind": "accuracy", "contender": contender.name, "runtime": runtime, "artifact": kind, "seed": seed}
        identity |= {"model": SUBJECT.name, "steps": seen["steps"], "versions": versions}
        if rows.known(RESULT, identity):
            continue
        answers = file_predictions(open_session(file, runtime), [batch.numpy() for batch in images]).numpy()
        reached = 100 * float(np.mean(answers == labels))
        numbers = {"accuracy": reached, "lost": _original(runtime, images, labels) - reached, **seen}
        numbers |= {"bytes": size_bytes(file), "n": 1, "spread": rows.spread([reached])}
        rows.add(RESULT, identity, numbers, [seed])
        print(f"{contender.name}, {kind} in {runtime}: {reached:.2f} %", flush=True)


def _original(runtime: Runtime, images: Sequence[Tensor], labels: Any) -> float:
    """Return the test accuracy of the original ResNet-56 in float32, in percent."""
    with tempfile.TemporaryDirectory() as scratch:
        path = export(SUBJECT.network(), images[0], Path(scratch) / "fp32.onnx")
        session = open_session(path, runtime, precision="float32")
        answers = file_predictions(session, [batch.numpy() for batch in images]).numpy()
    return 100 * float(np.mean(answers == labels))


def report_latency(
    made: dict[str, Path], runtime: Runtime, batch: int, seconds: float, versions: dict[str, str]
) -> None:
    """Write milliseconds for each artifact, and tersor's ratio to each, from one run on one machine."""
    what = {"model": SUBJECT.name, "runtime": runtime, "batch": batch, "versions": versions}
    names = [*made, f"{OURS}, again", "fp32", tables.DEFAULT_PRECISION]
    identities = [{"kind": "ratio", "pair": f"{OURS} / {name}", **what} for name in names if name != OURS]
    if all(rows.known(RESULT, identity) for identity in identities):
        return
    with tempfile.TemporaryDirectory() as scratch:
        example = SUBJECT.calibration(0)[:1]
        original = export(SUBJECT.network(), example, Path(scratch) / "fp32.onnx")
        openers = {name: partial(open_session, artifact(each, runtime), runtime) for name, each in made.items()}
        openers[f"{OURS}, again"] = openers[OURS]
        openers["fp32"] = partial(open_session, original, runtime, precision="float32")
        openers[tables.DEFAULT_PRECISION] = partial(open_session, original, runtime)
        precisions = {name: opener().precision for name, opener in openers.items()}
        others = [name for name in names if name != OURS]
        timings = measure_latency(
            openers,
            example.numpy(),
            [batch],
            ratios=lambda timed, size: [timed.ratio(OURS, name, size) for name in others],
            seconds=seconds,
        )
    for name, precision in precisions.items():
        spread = asdict(timings.spread(name, batch))
        identity = {"kind": "milliseconds", "artifact": name, **what}
        tables.add(RESULT, identity, "milliseconds", spread, {"precision": precision})
    for name, identity in zip(others, identities, strict=True):
        tables.add_ratio(RESULT, identity, timings.ratio(OURS, name, batch), {})
    print(f"{runtime}, batch {batch}: timed", flush=True)


def show() -> None:
    """Print the rows of this machine."""
    here = rows.machine()
    found = [row for row in rows.read(RESULT) if row["machine"] == here]
    heads = (
        "contender",
        "runtime",
        "artifact",
        "seed",
        "steps",
        "minutes",
        "MACs",
        "float",
        "accuracy",
        "lost",
        "bytes",
    )
    table = Table(*heads, title="ResNet-56 on CIFAR-10 JPEG: 10,000 test images", title_justify="left")
    for row in [row for row in found if row["kind"] == "accuracy"]:
        minutes, fewer = f"{row['training_seconds'] / 60:.1f}", f"{row['macs_ratio']:.2f}x fewer"
        told = (row["contender"], row["runtime"], row["artifact"], str(row["seed"]), str(row["steps"]), minutes, fewer)
        reached = (f"{row['float_accuracy']:.2f}", f"{row['accuracy']:.2f}", f"{row['lost']:.2f}", f"{row['bytes']:,}")
        table.add_row(*told, *reached)
    console = Console(width=170)
    console.print(table)
    for kind, key in (("ratio", "pair"), ("milliseconds", "artifact")):
        chosen = [row for row in found if row["kind"] == kind]
        if chosen:
            console.print(tables.by_batch(f"{kind} ({tables.what_spread(kind)})", chosen, kind, key))


def main() -> None:
    """Measure what `bench/results/equal_time.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=20, help="time limit per runtime and batch size")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        with rows.alone():
            measure(chosen.seeds, chosen.seconds)
    show()


def measure(seeds: Sequence[int], seconds: float) -> None:
    """Train every contender, then compare all artifacts in one run."""
    versions = {**tables.versions(), "torch-pruning": tables.version("torch-pruning")}
    seconds_a_step = pace()
    ours = stage().steps
    made: dict[str, Path] = {}
    for seed in seeds:
        for each in CONTENDERS:
            steps = round(ours * seconds_a_step[OURS] / seconds_a_step[each.name])
            path = artifacts(each, seed, steps)
            report_accuracy(each, path, seed, versions)
            made.setdefault(each.name, path)
    for runtime in RUNTIMES:
        for batch in (1, 32, 128):
            report_latency(made, runtime, batch, seconds, versions)


if __name__ == "__main__":
    main()
