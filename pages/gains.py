"""What every method gained in `bench/results/`: the first lines of its card, and the tables of the decision guide."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"

Row = dict[str, Any]


@cache
def rows(benchmark: str) -> list[Row]:
    """The rows of `bench/results/NAME.json`."""
    return json.loads((RESULTS / f"{benchmark}.json").read_text())


def matching(benchmark: str, **wanted: Any) -> list[Row]:
    """The rows with these values.

    Raises:
        LookupError: there are none.
    """
    found = [row for row in rows(benchmark) if all(row.get(key) == value for key, value in wanted.items())]
    if not found:
        raise LookupError(f"bench/results/{benchmark}.json has no row with {wanted}")
    return found


def _minutes(minutes: float) -> str:
    return f"{60 * minutes:.0f} s" if minutes < 1 else f"{minutes:.1f} min"


def distillation_minutes(contender: str) -> str:
    """Minutes of the training; seeds 1 and 2 ran on the same kind of machine."""
    taken = matching("distillation", kind="accuracy", contender=contender)
    return _minutes(median(row["seconds_without_teacher"] / 60 for row in taken if row["seed"] in (1, 2)))


def calibration_minutes(rung: str) -> str:
    """Minutes of quantization without training; the rows of later seeds shared their machine."""
    taken = matching("quantization", kind="ladder", rung=rung, bits=4, activation_bits=4)
    return _minutes(median(row["seconds"] / 60 for row in taken if row["seed"] < 3 and row["machine"]["gpu"] is None))


def training_minutes(contender: str) -> str:
    """Minutes of the training on a processor."""
    taken = matching("quantization", kind="trained", contender=contender)
    return _minutes(median(row["minutes"] for row in taken if row["machine"]["gpu"] is None))


def step_ratio(benchmark: str, **wanted: str) -> str:
    """Time of a training step over that of plain SGD, in the newest row."""
    newest = max(matching(benchmark, **wanted), key=lambda row: row["date"])
    return f"{newest['ratio']:.2f} times a plain step"


@dataclass(frozen=True)
class Gain:
    """One measured comparison.

    Attributes:
        setting: network, data and protocol.
        benchmark: the results file.
        method, reference: values of the rows of the method and of what it is compared with.
        reference_name: the reference in words.
        accuracy: the key of the accuracy in percent.
        cost: time that the method takes.
        cost_of: what `cost` is the time of.
        avoid: when another method is better.
    """

    setting: str
    benchmark: str
    method: Mapping[str, Any]
    reference: Mapping[str, Any]
    reference_name: str
    cost: Callable[[], str]
    cost_of: str
    avoid: str
    accuracy: str = "accuracy"

    def accuracies(self, wanted: Mapping[str, Any]) -> list[float]:
        """The accuracies of the rows with these values, in percent: the newest row of every seed."""
        newest = {
            row["seeds"][0]: row for row in sorted(matching(self.benchmark, **wanted), key=lambda row: row["date"])
        }
        return [row[self.accuracy] for row in newest.values()]

    @property
    def points(self) -> float:
        """Mean accuracy of the method minus that of the reference, in points, to one decimal."""
        return round(mean(self.accuracies(self.method)) - mean(self.accuracies(self.reference)), 1) + 0.0

    @property
    def distinguishable(self) -> bool:
        """Whether the ranges over the seeds do not overlap."""
        ours, theirs = self.accuracies(self.method), self.accuracies(self.reference)
        return min(ours) > max(theirs) or max(ours) < min(theirs)

    def sentence(self) -> str:
        """The gain with its range, as the first lines of a card."""
        ours, theirs = self.accuracies(self.method), self.accuracies(self.reference)
        doubt = "" if self.distinguishable else " The ranges overlap, so the difference may be chance."
        return (
            f"**{self.points:+.1f} points** over {self.reference_name}: {_range(ours)} compared with "
            f"{_range(theirs)}.{doubt}\n\n{self.setting} {self.cost_of}: {self.cost()}. "
            f"Source: `bench/results/{self.benchmark}.json`."
        )


def _range(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f} % (one seed)"
    return f"{mean(values):.1f} % ({min(values):.1f} to {max(values):.1f}, {len(values)} runs)"


_distillation = partial(
    Gain,
    "A ResNet-20 with a trained ResNet-56 as the teacher, 20 epochs of 10,000 images of CIFAR-10.",
    "distillation",
    reference={"kind": "accuracy", "contender": "alone"},
    reference_name="the same student trained on the labels only",
    cost_of="Training on 2 threads of an AMD EPYC",
)


def _distilled(contender: str, avoid: str) -> Gain:
    return _distillation(
        method={"kind": "accuracy", "contender": contender},
        cost=partial(distillation_minutes, contender),
        avoid=avoid,
    )


def _few_bits(rung: str, reference: str, reference_name: str, bits: int, avoid: str) -> Gain:
    def of(name: str) -> Mapping[str, Any]:
        return {"kind": "ladder", "rung": name, "bits": bits, "activation_bits": 8}

    return Gain(
        f"A trained ResNet-20 (88.6 % in float) on CIFAR-10, with {bits}-bit weights and 8-bit activations, without "
        "further training.",
        "quantization",
        of(rung),
        of(reference),
        reference_name,
        partial(calibration_minutes, rung),
        "Time at 4 bits, on 1 or 2 threads",
        avoid,
    )


def _trained(contender: str, avoid: str) -> Gain:
    return Gain(
        "A trained ResNet-20 with 4-bit weights and activations, 4 epochs of 45,000 images of CIFAR-10.",
        "quantization",
        {"kind": "trained", "contender": contender},
        {"kind": "ladder", "rung": "ptq", "bits": 4, "activation_bits": 4},
        "`ptq`, which does not train",
        partial(training_minutes, contender),
        "Training on 2 threads of an AMD EPYC",
        avoid,
    )


def _masked(method: str, contender: str, reference: str, reference_name: str, avoid: str) -> Gain:
    return Gain(
        "A trained ResNet-20 with 95 % of its convolution weights masked, 10 epochs of 20,000 images of CIFAR-10.",
        "pruning",
        {"contender": contender, "sparsity": 0.95},
        {"contender": reference, "sparsity": 0.95},
        reference_name,
        partial(step_ratio, "pruning_costs", what=method),
        "A training step",
        avoid,
    )


GAINS: dict[str, Gain] = {
    "soft_targets": _distilled(
        "soft targets",
        "The teacher's features are available: `fitnet`, `factor_transfer` and `reviewkd` gained more.",
    ),
    "dkd": _distilled("dkd", "There are no labels."),
    "dist": _distilled("dist", "There are labels: `dkd` gained more."),
    "attention_transfer": _distilled("attention, p = 2", "Features can be matched directly: `fitnet` gained more."),
    "fitnet": _distilled("fitnet", "The teacher's features are not available, only its outputs."),
    "factor_transfer": _distilled("factors, k = 0.5", "The teacher's features are not available, only its outputs."),
    "reviewkd": _distilled("reviewkd", "Training time matters: `fitnet` gained the same in less time."),
    "crd": _distilled("crd", "Training lasts only tens of epochs: `crd` needs more."),
    "ptq": _few_bits(
        "ptq", "min-max", "min-max ranges without correction", 3, "Weights have 2 bits: learn the rounding, or train."
    ),
    "adaround": _few_bits("adaround", "ptq", "`ptq`", 2, "8 bits are enough: `ptq` loses almost nothing there."),
    "brecq": _few_bits("brecq", "adaround", "`adaround`", 2, "Weights have 3 bits or more: `adaround` is as good."),
    "qat": _trained("qat, W4A4", "The bit width is low: plain `qat` was worse than `ptq` at 4 bits. Use `lsq`."),
    "lsq": _trained("lsq, W4A4", "There are no labels, or no time to train."),
    "psgd": Gain(
        "A trained ResNet-20, 5 more epochs of 45,000 images of CIFAR-10, then rounded to 4 bits without correction.",
        "psgd",
        {"kind": "accuracy", "contender": "psgd, 4 bits"},
        {"kind": "accuracy", "contender": "sgd"},
        "plain SGD",
        partial(step_ratio, "step_costs", method="psgd"),
        "A training step",
        "You can calibrate: `adaround` after plain SGD was more accurate. The bits must be known before training.",
        accuracy="4 bits",
    ),
    "weight_pruning": _masked(
        "weight_pruning", "iterative", "one-shot, random", "a random mask", "You want speed: a mask is not faster."
    ),
    "dpf": _masked(
        "dpf",
        "dpf",
        "iterative",
        "fixed masks (`weight_pruning`)",
        "Training is short or the learning rate high: fixed masks were as good.",
    ),
    "dcil": _masked("dcil", "dcil", "dpf", "`dpf`", "Training time matters: a step takes twice as long."),
    "rigl": _masked(
        "rigl", "rigl", "iterative", "fixed masks (`weight_pruning`)", "Training starts from a trained network."
    ),
    "channel_pruning": Gain(
        "A ResNet-56 (90.3 %) with half of its MACs, the original as the teacher, on CIFAR-10: `importance: obs`, "
        "`scope: global`, `branches: 3`.",
        "pruning_structured",
        {"contender": "tersor, taught", "removal": "obs, global, 3 branches", "learning_rate": 0.02},
        {"contender": "torch-pruning, taught", "times": 2.0, "learning_rate": 0.02},
        "Torch-Pruning with the same teacher",
        lambda: "as many steps as fit into 10 minutes on 2 threads of an AMD EPYC, for both",
        "Training",
        "The network is narrow, or a smaller network of the same family can be distilled.",
    ),
}
"""Method -> its measured gain. A method without an entry has no rows."""

FAMILIES = {
    "Distillation": (
        *("soft_targets", "dkd", "dist", "attention_transfer"),
        *("fitnet", "factor_transfer", "reviewkd", "crd"),
    ),
    "Quantization": ("ptq", "mixed_precision", "adaround", "brecq", "qat", "lsq", "psgd"),
    "Pruning": ("channel_pruning", "weight_pruning", "dpf", "dcil", "rigl", "group_lasso"),
}
"""The three parts of the field, and their methods."""


def table(family: str) -> str:
    """The gains of a family as a Markdown table."""
    lines = ["| method | points gained | over | time | when not to use it |", "|---|---|---|---|---|"]
    for name in FAMILIES[family]:
        link = f"[`{name}`](methods/{name}.md)"
        if name not in GAINS:
            lines.append(f"| {link} | not measured | | | |")
            continue
        gain = GAINS[name]
        points = f"{gain.points:+.1f}" if gain.distinguishable else f"{gain.points:+.1f} (may be chance)"
        lines.append(f"| {link} | {points} | {gain.reference_name} | {gain.cost()} | {gain.avoid} |")
    return "\n".join(lines)
