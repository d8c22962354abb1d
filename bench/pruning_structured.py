"""Remove channels from a trained ResNet-56: tersor, torch-pruning's pruner and controls, at equal MACs.

All contenders get the same network, images, augmentation, optimizer and schedule as in `equal_time.py`, and the same
minutes of training: the seconds per step are measured first, interleaved, and a contender with a cheaper step takes
more steps. A contender counts only if its MACs fell by the requested factor, to 2 %; the row names the actual factor.
The accuracy is float32 on all 10,000 test images after the last step, never the best on the way. Latency is that of the
float network in both runtimes, interleaved in one run; below 1 tersor is faster.

Older rows differ in three ways. Rows with a learning rate of 0.005 were made when it had been chosen on validation
images. Rows that name no rate have the recipe's, and those of tersor were made before it refitted the filters after a
removal. Rows that name no removal are by magnitude, the same fraction of every layer; those by `obs, global` remove no
branches.

Trained networks are stored in a folder beside the images, named by their steps. So the steps that a machine can take in
the minutes may be taken on a faster one, and the folder copied back: the row says where it was trained.

    tersor, taught            half of the MACs, by output error per MAC, the original as the teacher (the recipe)
    tersor                    the same with labels only
    torch-pruning             its MagnitudePruner, restricted to the inner channels by hand, labels only
    torch-pruning, taught     the same with tersor's teacher
    from scratch              the shape of tersor's result with new weights, labels only
    resnet20, distilled       the trained ResNet-20 with the ResNet-56 as its teacher
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import equal_time
import rows
import tables
from equal_time import RUNTIMES, SUBJECT
from images import MEAN, STD, cifar, folder
from tersor.data import Batches
from tersor.deploy.onnx import export
from tersor.evaluation.costs import costs
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.scoring import network_score
from tersor.evaluation.session import open_session
from tersor.methods.channel_pruning import ChannelPruning
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.loop import fit
from tersor.training.method import Method, chain
from tersor.training.options import Training
from tersor.training.schedule import steps_per_epoch

RESULT = "pruning_structured"
OURS = "tersor, taught"
TIMES = (2.0, 2.6)
EXAMPLE = torch.zeros(1, 3, 32, 32)
NEARLY = 1.02
"""The factor by which MACs may exceed the request and still count: widths come in blocks."""

ROUND_TO = {2.0: 8, 2.6: 2}
"""Channels are rounded to a multiple of it.

At 2.6 times fewer MACs and after 300 steps with labels only, networks with multiples of 8, 4 and 2 classify 88.2, 88.6
and 90.3 % of the validation images correctly: layers of 16 channels offer few choices.
"""


def methods(times: float) -> list[Method]:
    """Return the recipe's methods for that many times fewer MACs: removal, then the teacher's losses."""
    removal, *taught = equal_time.stage().methods
    assert isinstance(removal, ChannelPruning)
    return [dataclasses.replace(removal, keep_macs=1 / times, round_to=ROUND_TO[times]), *taught]


def attached(chosen: Sequence[Method], model: nn.Module, seed: int, steps: int) -> Attachment:
    """Attach the methods and run `begin`."""
    calm = Batches(cifar().train, 64, mean=MEAN, std=STD, shuffle=True, seed=seed)
    found = chain(chosen, model, AttachContext(data=calm, teacher=SUBJECT.network()), steps=steps)
    found.begin()
    return found


@cache
def of_torch_pruning(times: float) -> tuple[float, int]:
    """Return the ratio and rounding with which torch-pruning reaches the MACs.

    The coarsest rounding within 5 % of them is used, for its latency, or else the nearest. Half of all inner channels,
    in multiples of 8, give 1.98 times fewer.
    """
    wanted = costs(SUBJECT.network(), EXAMPLE).macs / times
    found: list[tuple[int, float, int]] = []
    for round_to in (8, 4, 2, 1):
        for percent in range(40, 90):
            macs = costs(equal_time.torch_pruned(percent / 100, round_to), EXAMPLE).macs
            if macs <= NEARLY * wanted:
                found.append((macs, percent / 100, round_to))
                break
        if found and found[-1][0] >= 0.95 * wanted:
            return found[-1][1:]
    return max(found)[1:]


def from_scratch(times: float, seed: int) -> nn.Module:
    """Return tersor's shape with new weights in every layer."""
    model = attached(methods(times)[:1], SUBJECT.network(), seed, 0).model
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model


@dataclass(frozen=True)
class Contender:
    """A way to prune the ResNet-56.

    Attributes:
        name: its name in the rows.
        begun: function of the factor, seed and steps that returns what is trained.
        taught: whether the ResNet-56 is the teacher.
        learning_rate: the highest rate; None is the recipe's.
        removal: whether tersor removes channels, with the recipe's importance and scope, which the rows name.
    """

    name: str
    begun: Callable[[float, int, int], Attachment]
    taught: bool
    learning_rate: float | None = None
    removal: bool = False

    def training(self) -> Training:
        """Return the recipe's training options."""
        stage = equal_time.stage()
        if self.learning_rate is None:
            return stage
        optimizer = stage.optimizer.model_copy(update={"learning_rate": self.learning_rate})
        return stage.model_copy(update={"optimizer": optimizer})

    def told(self) -> dict[str, str]:
        """Return what identifies its rows besides the name."""
        removal = methods(2.0)[0]
        assert isinstance(removal, ChannelPruning)
        return (
            {"removal": f"{removal.importance}, {removal.scope}, {removal.branches} branches"} if self.removal else {}
        )


CONTENDERS = {
    each.name: each
    for each in (
        Contender(
            OURS,
            lambda times, seed, steps: attached(methods(times), SUBJECT.network(), seed, steps),
            True,
            removal=True,
        ),
        Contender(
            "tersor",
            lambda times, seed, steps: attached(methods(times)[:1], SUBJECT.network(), seed, steps),
            False,
            removal=True,
        ),
        Contender(
            "torch-pruning",
            lambda times, _seed, _steps: Attachment(equal_time.torch_pruned(*of_torch_pruning(times))),
            False,
        ),
        Contender(
            "torch-pruning, taught",
            lambda times, seed, steps: attached(
                methods(times)[1:], equal_time.torch_pruned(*of_torch_pruning(times)), seed, steps
            ),
            True,
        ),
        Contender(
            "from scratch",
            lambda times, seed, _steps: Attachment(from_scratch(times, seed)),
            False,
            learning_rate=0.1,
            removal=True,
        ),
        Contender("resnet20, distilled", lambda _times, seed, steps: equal_time.distilled_resnet20(seed, steps), True),
    )
}


def trained(contender: Contender, times: float, seed: int, steps: int) -> tuple[nn.Module, float]:
    """Return the network after so many steps, and the seconds they took."""
    begun = contender.begun(times, seed, steps)
    teacher = SUBJECT.network() if contender.taught else None
    fitted = fit(begun, equal_time.batches(seed), contender.training(), steps=steps, teacher=teacher, seed=seed)
    begun.finish()
    return begun.model.eval(), fitted.seconds


def pace(times: float) -> dict[str, float]:
    """Return the seconds per step of each contender, measured once on this machine."""
    identities = {name: {"kind": "pace", "contender": name, "times": times} for name in CONTENDERS}
    if not all(rows.known(RESULT, identity) for identity in identities.values()):
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(equal_time.PACE_ROUNDS):
            for name, each in CONTENDERS.items():
                seconds[name].append(trained(each, times, 0, equal_time.PACE_STEPS)[1] / equal_time.PACE_STEPS)
        for name, identity in identities.items():
            numbers = {"seconds_a_step": statistics.median(seconds[name]), "n": equal_time.PACE_ROUNDS}
            rows.add(RESULT, identity, {**numbers, "spread": rows.spread(seconds[name])}, [0])
            print(f"{name}, {times} times fewer: {numbers['seconds_a_step']:.3f} s per step", flush=True)
    here = rows.machine()
    found = [row for row in rows.read(RESULT) if row["kind"] == "pace" and row["machine"] == here]
    return {row["contender"]: row["seconds_a_step"] for row in found if row["times"] == times}


def made(contender: Contender, times: float, seed: int, steps: int) -> Path:
    """Return a folder with the float network as ONNX and the training record; create it if it is missing."""
    name = contender.name.replace(", ", "-").replace(" ", "-")
    rate = contender.training().optimizer.learning_rate
    removal = "".join(f"-{each.replace(', ', '-')}" for each in contender.told().values())
    path = folder().parent / "pruning_structured" / f"{name}-{times}-{seed}-{steps}-{rate}{removal}"
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        partial.mkdir()
        model, seconds = trained(contender, times, seed, steps)
        export(model, EXAMPLE, partial / "model.onnx")
        spent, before = costs(model, EXAMPLE), costs(SUBJECT.network(), EXAMPLE)
        reached = network_score(model, Batches(cifar().test, 500, mean=MEAN, std=STD))
        seen = {"accuracy": reached, "macs": spent.macs, "macs_ratio": before.macs / spent.macs}
        seen |= {"parameters": spent.parameters, "training_seconds": seconds, "trained_on": rows.machine()}
        (partial / "seen.json").write_text(json.dumps(seen))
        partial.rename(path)
    return path


@cache
def accuracy_of_the_original() -> float:
    """Return the original's test accuracy in percent."""
    return network_score(SUBJECT.network(), Batches(cifar().test, 500, mean=MEAN, std=STD))


def report_accuracy(contender: Contender, times: float, seed: int, steps: int, budget: str) -> Path:
    """Write the row of one training run; return its folder."""
    path = made(contender, times, seed, steps)
    identity = {"kind": "accuracy", "contender": contender.name, "times": times, "budget": budget, "seed": seed}
    identity |= {"steps": steps, "learning_rate": contender.training().optimizer.learning_rate}
    identity |= {"torch_pruning": tables.version("torch-pruning"), **contender.told()}
    if not rows.known(RESULT, identity):
        seen = json.loads((path / "seen.json").read_text())
        lost = accuracy_of_the_original() - seen["accuracy"]
        numbers = {**seen, "lost": lost, "counts": seen["macs_ratio"] >= times / NEARLY, "n": 1}
        rows.add(RESULT, identity, {**numbers, "spread": rows.spread([seen["accuracy"]])}, [seed])
        print(f"{contender.name}, {times} times fewer, {budget}: {seen['accuracy']:.2f} %", flush=True)
    return path


def report_latency(folders: dict[str, Path], times: float, batch: int, seconds: float) -> None:
    """Write milliseconds for each, and tersor's ratio to each, from one interleaved run per runtime."""
    for runtime in RUNTIMES:
        what = {"times": times, "runtime": runtime, "batch": batch, "versions": tables.versions()}
        what |= CONTENDERS[OURS].told()
        others = [name for name in (*folders, f"{OURS}, again", "original") if name != OURS]
        identities = {name: {"kind": "ratio", "pair": f"{OURS} / {name}", **what} for name in others}
        if all(rows.known(RESULT, identity) for identity in identities.values()):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            original = export(SUBJECT.network(), EXAMPLE, Path(scratch) / "original.onnx")
            files = {name: path / "model.onnx" for name, path in folders.items()}
            files |= {f"{OURS}, again": files[OURS], "original": original}
            openers = {name: partial(open_session, file, runtime) for name, file in files.items()}
            precisions = {name: opener().precision for name, opener in openers.items()}
            timings = measure_latency(
                openers,
                equal_time.SUBJECT.calibration(0)[:1].numpy(),
                [batch],
                ratios=lambda timed, size: [timed.ratio(OURS, name, size) for name in others],  # noqa: B023
                seconds=seconds,
            )
        for name, precision in precisions.items():
            identity = {"kind": "milliseconds", "artifact": name, **what}
            spread = asdict(timings.spread(name, batch))
            tables.add(RESULT, identity, "milliseconds", spread, {"precision": precision})
        for name, identity in identities.items():
            tables.add_ratio(RESULT, identity, timings.ratio(OURS, name, batch), {})
        print(f"{runtime}, batch {batch}, {times} times fewer: timed", flush=True)


def measure(seeds: Sequence[int], minutes: float, epochs: int, seconds: float) -> None:
    """Train all at 2.0 and one seed at 2.6 for equal minutes, and tersor with its teacher for `epochs`; time all."""
    for times in TIMES:
        step, folders = pace(times), dict[str, Path]()
        for seed in seeds if times == TIMES[0] else seeds[:1]:
            for name, each in CONTENDERS.items():
                steps = max(1, round(60 * minutes / step[name]))
                folders.setdefault(name, report_accuracy(each, times, seed, steps, f"{minutes:g} minutes"))
        for batch in (1, 32, 128):
            report_latency(folders, times, batch, seconds)
    if epochs:
        ours = CONTENDERS[OURS]
        steps = epochs * steps_per_epoch(equal_time.batches(0), ours.training())
        report_accuracy(ours, TIMES[0], seeds[0], steps, f"{epochs} epochs")


def show() -> None:
    """Print the rows of this machine."""
    here = rows.machine()
    found = [row for row in rows.read(RESULT) if row["machine"] == here]
    heads = ("contender", "removal", "asked", "fewer MACs", "budget", "seed", "steps", "rate", "on", "right", "lost")
    table = Table(*heads, title="ResNet-56 on CIFAR-10 JPEG: 10,000 test images", title_justify="left")
    for row in [row for row in found if row["kind"] == "accuracy"]:
        fewer = f"{row['macs_ratio']:.2f}x" + ("" if row["counts"] else ", does not count")
        asked = (row["contender"], row.get("removal", ""), f"{row['times']}x")
        told = (*asked, fewer, row["budget"], str(row["seed"]), str(row["steps"]))
        rate = f"{row['learning_rate']:g}" if "learning_rate" in row else ""
        where = row["trained_on"]["gpu"] or row["trained_on"]["cpu"]
        table.add_row(*told, rate, where, f"{row['accuracy']:.2f}", f"{row['lost']:.2f}")
    console = Console(width=190)
    console.print(table)
    for times in TIMES:
        for kind, key in (("ratio", "pair"), ("milliseconds", "artifact")):
            chosen = [row for row in found if row["kind"] == kind and row["times"] == times]
            for removal in dict.fromkeys(row.get("removal", "magnitude, layer") for row in chosen):
                title = f"{times} times fewer MACs, {removal}: {kind}, median (p10 to p90)"
                its = [row for row in chosen if row.get("removal", "magnitude, layer") == removal]
                console.print(tables.by_batch(title, its, kind, key))


def main() -> None:
    """Measure what `bench/results/pruning_structured.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=10, help="training time of every contender")
    parser.add_argument(
        "--epochs", type=int, default=20, help="epochs of the extra row of `tersor, taught`; 0 omits it"
    )
    parser.add_argument("--seconds", type=float, default=20, help="time limit per runtime and batch size")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        with rows.alone():
            measure(chosen.seeds, chosen.minutes, chosen.epochs, chosen.seconds)
    show()


if __name__ == "__main__":
    main()
