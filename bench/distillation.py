"""Compare distillation methods under one protocol: a ResNet-20 from scratch, a trained ResNet-56 as the teacher.

10,000 training images, 20 epochs, the same augmentation, schedule and steps for every row. A loss weight is the best of
three on the validation images after 5 epochs with one seed, and is then fixed. The test set is used once, after the
last epoch. An interrupted row continues from its last checkpoint.

Rows from different machines are comparable: accuracy depends only on the precision, which the row names. All rows of a
seed see the same batches, so the teacher runs once per batch, and its outputs are stored beside the images (about 25 GB
per seed) until the seed's last row.

One more experiment prunes and quantizes a trained ResNet-20 during 5 epochs, with and without a teacher.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import rows
import training
from images import MEAN, STD, TRAINED, cifar, folder
from tersor.data import Batches
from tersor.graph.feature_extraction import FeatureExtractor
from tersor.pipeline.experiment import Experiment
from tersor.recipe import Recipe

RESULT = "distillation"
IMAGES, EPOCHS, CHOOSING_EPOCHS, COMPOSED_EPOCHS, LONG = 10_000, 20, 5, 5, 60
SEEDS, TEMPERATURE = (0, 1, 2), 4.0
ONE_SEED = (0,)

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A method and its loss weight.

    Attributes:
        method: its name.
        parameters: its parameters except the weight.
        weights: three candidates.
        weighed: function from a weight to parameters.
    """

    method: str
    parameters: Parameters
    weights: tuple[float, ...]
    weighed: Callable[[float], Parameters] = lambda weight: {"loss_weight": weight}

    @property
    def identity(self) -> Parameters:
        """Return the key under which the chosen weight is stored."""
        return {"kind": "weight", "method": self.method, "parameters": self.parameters}


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        name: its name in the rows.
        parts: methods that have a loss weight.
        network: the student.
        seeds: one row for each.
        chosen_as: the parts whose weights it uses, if not its own.
        given: the weights of the parts, if they are not chosen.
        laid: methods attached to a trained network, which then trains for a few more epochs.
        length: epochs of training from scratch.
    """

    name: str
    parts: tuple[Part, ...] = ()
    network: str = "resnet20"
    seeds: tuple[int, ...] = SEEDS
    chosen_as: tuple[Part, ...] = ()
    given: tuple[float, ...] = ()
    laid: tuple[dict[str, Parameters], ...] = ()
    length: int = EPOCHS

    @property
    def epochs(self) -> int:
        """Return the number of epochs."""
        return COMPOSED_EPOCHS if self.laid else self.length


SOFT = Part("soft_targets", {"temperature": 4.0, "label_weight": 0.1}, (0.3, 0.9, 2.7))
SOFT_ALONE = Part("soft_targets", {"temperature": 4.0, "label_weight": 0.0}, (0.3, 1.0, 3.0))
ATTENTION = Part("attention_transfer", {"p": 2}, (300.0, 1000.0, 3000.0))
ATTENTION_1 = Part("attention_transfer", {"p": 1}, (300.0, 1000.0, 3000.0))
FACTORS = Part("factor_transfer", {"paraphrase_rate": 0.5}, (3.0, 11.0, 33.0))
FITNET = Part("fitnet", {}, (3.0, 10.0, 100.0))
DKD = Part("dkd", {}, (2.0, 4.0, 8.0), lambda weight: {"beta": weight})
DIST = Part("dist", {}, (0.5, 1.0, 2.0), lambda weight: {"beta": weight, "gamma": weight})
CRD = Part("crd", {"negatives": 2048}, (0.2, 0.8, 2.4))
REVIEW = Part("reviewkd", {}, (0.3, 1.0, 5.0))


LAID = (
    {"weight_pruning": {"sparsity": 0.8, "sparsity_schedule": "cubic"}},
    {"qat": {"bits": 4, "activation_bits": 4}},
)
"""A trained ResNet-20 loses four fifths of its weights and is quantized to 4 bits during training."""


SEARCH = (
    Contender("crd, weight 0.8", (CRD,), seeds=ONE_SEED, given=(0.8,)),
    Contender("crd, 16,384 others", (Part("crd", {"negatives": 16384}, ()),), seeds=ONE_SEED, given=(0.2,)),
    Contender("alone, 60 epochs", seeds=ONE_SEED, length=LONG),
    Contender("crd, 60 epochs", (CRD,), seeds=ONE_SEED, chosen_as=(CRD,), length=LONG),
)
"""Why is crd hardly better than the student alone? The authors' weight, their negatives, three times as long."""


def _at(part: Part, **parameters: Any) -> Part:
    return Part(part.method, {**part.parameters, **parameters}, part.weights, part.weighed)


CONTENDERS = (
    Contender("alone"),
    Contender("soft targets", (SOFT,)),
    Contender("soft targets, no labels", (SOFT_ALONE,)),
    Contender("attention, p = 2", (ATTENTION,)),
    Contender("attention, p = 1", (ATTENTION_1,)),
    Contender("factors, k = 0.5", (FACTORS,)),
    Contender("fitnet", (FITNET,)),
    Contender("dkd", (DKD,)),
    Contender("dist", (DIST,)),
    Contender("crd", (CRD,)),
    Contender("reviewkd", (REVIEW,)),
    Contender("soft targets + attention", (SOFT, ATTENTION)),
    Contender("soft targets + factors", (SOFT, FACTORS)),
    Contender("resnet32 alone", network="resnet32", seeds=ONE_SEED),
    *(
        Contender(f"factors, k = {k:g}", (_at(FACTORS, paraphrase_rate=k),), seeds=ONE_SEED, chosen_as=(FACTORS,))
        for k in (0.25, 0.75, 1.0)
    ),
    *(
        Contender(f"soft targets, T = {t:g}", (_at(SOFT, temperature=t),), seeds=ONE_SEED, chosen_as=(SOFT,))
        for t in (1.0, 2.0, 8.0, 16.0)
    ),
    *SEARCH,
    Contender("pruned and quantized, alone", laid=LAID),
    Contender("pruned and quantized, factors", (FACTORS,), laid=LAID),
)


def recipe(contender: Contender, weights: tuple[float, ...], seed: int, epochs: int) -> Recipe:
    """Return one stage of training: from scratch or, with methods attached, from a trained network."""
    methods = [*contender.laid] + [
        {part.method: {**part.parameters, **part.weighed(weight)}}
        for part, weight in zip(contender.parts, weights, strict=True)
    ]
    stage = {
        "epochs": epochs,
        "optimizer": {"learning_rate": 0.01 if contender.laid else 0.1},
        "lr_schedule": {"warmup_epochs": 0 if contender.laid else 1},
        "methods": methods,
    }
    teacher = {"name": "resnet56", "num_classes": 10, "weights": training.weights_of("resnet56")}
    return training.recipe(stage, network=contender.network, scratch=not contender.laid, teacher=teacher, seed=seed)


class Recorded(nn.Module):
    """A teacher that runs once per batch for all students: the same seed gives the same batches.

    Its layers are modules that return the stored outputs, so `layer3` can be found by name. The bits equal the
    teacher's. The seconds of a row are therefore those of the student alone.
    """

    layers = ("layer1", "layer2", "layer3")

    def __init__(self, teacher: nn.Module, kept: Path) -> None:
        super().__init__()
        self.teacher = teacher
        self.kept = kept
        for path in self.layers:
            self.add_module(path, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) for images (N, 3, H, W)."""
        digest = hashlib.blake2b(images.permute(0, 2, 3, 1).contiguous().numpy(), digest_size=16).hexdigest()
        path = self.kept / f"{digest}.safetensors"
        if not path.exists():
            self._record(images, path)
        with safe_open(path, "pt") as opened:
            for name in self.layers:
                layer = self.get_submodule(name)
                if layer._forward_hooks:  # avoids reading 15 MB that are not needed
                    layer(opened.get_tensor(name).permute(0, 3, 1, 2))
            return opened.get_tensor("logits")

    def _record(self, images: Tensor, path: Path) -> None:
        logits, given = FeatureExtractor(self.teacher, self.layers)(images)
        told = {name: value.permute(0, 2, 3, 1).contiguous().clone() for name, value in given.items()}
        self.kept.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        save_file({"logits": logits.contiguous().clone(), **told}, partial)
        partial.rename(path)


def trained(contender: Contender, weights: tuple[float, ...], seed: int, epochs: int) -> dict[str, Any]:
    """Return the accuracy on both sets after the last epoch, the training seconds, and the methods' metrics."""
    kept = folder().parent / RESULT / f"teacher-{seed}"

    def record(experiment: Experiment) -> Experiment:
        assert experiment.teacher is not None
        if epochs > EPOCHS:  # the teacher outputs of a longer training would not fit on the disk
            return experiment
        return replace(experiment, teacher=Recorded(experiment.teacher, kept))

    given = recipe(contender, weights, seed, epochs)
    experiment, told = training.walked(given, RESULT, cifar(IMAGES), prepared=record)
    found = {
        "accuracy": training.accuracy_on_test(experiment),
        "validation_accuracy": told["validation_score"],
        "seconds_without_teacher": told["training_seconds"],
        "steps": told["steps"],
        "precision": told["precision"],
        "weights": list(weights),
        "n": 1,
    }
    if "reconstruction" in told:
        found["reconstruction_error"] = told["reconstruction"]["errors"][-1]
    return found


def chosen(part: Part) -> float:
    """Return the loss weight of a part: the best of three on the validation images, from a row or measured now."""
    for weight in part.weights:
        identity = {**part.identity, "weight": weight, "epochs": CHOOSING_EPOCHS, "images": IMAGES}
        if rows.known(RESULT, identity, anywhere=True):
            continue
        found = trained(Contender(part.method, (part,)), (weight,), 0, CHOOSING_EPOCHS)
        reached = found.pop("validation_accuracy")
        numbers = {"validation_accuracy": reached, "seconds_without_teacher": found["seconds_without_teacher"]}
        rows.add(
            RESULT,
            identity,
            {**numbers, "precision": found["precision"], "n": 1, "spread": rows.spread([reached])},
            [0],
        )
        print(f"{part.method}, {part.parameters}, weight {weight:g}: {reached:.2f} % validation", flush=True)
    mine = [row for row in _rows("weight") if all(row[key] == value for key, value in part.identity.items())]
    return max(mine, key=lambda row: row["validation_accuracy"])["weight"]


def likeness() -> None:
    """Write the row of the teacher's mean prediction for the images of each class at T = 4."""
    identity = {"kind": "likeness", "teacher": "resnet56", "temperature": TEMPERATURE}
    if rows.known(RESULT, identity, anywhere=True):
        return
    teacher, test = TRAINED["resnet56"].network(), Batches(cifar().test, 500, mean=MEAN, std=STD)
    given = [(teacher(batch.images.contiguous()).detach(), batch.targets) for batch in test]
    softened = torch.cat([(logits / TEMPERATURE).softmax(1) for logits, _ in given])
    labels = torch.cat([each for _, each in given])
    means = {name: softened[labels == number].mean(0).tolist() for number, name in enumerate(cifar().classes)}
    rows.add(RESULT, identity, {"mean_answers": means, "n": len(labels), "spread": None}, [])


def _rows(kind: str) -> Iterator[rows.Row]:
    return (row for row in rows.read(RESULT) if row["kind"] == kind)


def measure(contender: Contender, seed: int) -> None:
    """Write the row of one seed, if it is missing."""
    identity = {"kind": "accuracy", "contender": contender.name, "seed": seed, "images": IMAGES}
    identity["epochs"] = contender.epochs
    if rows.known(RESULT, identity, anywhere=True):
        return
    weights = contender.given or tuple(map(chosen, contender.chosen_as or contender.parts))
    found = trained(contender, weights, seed, contender.epochs)
    rows.add(RESULT, identity, {**found, "spread": rows.spread([found["accuracy"]])}, [seed])
    print(f"{contender.name}, seed {seed}: {found['accuracy']:.2f} %", flush=True)


def show() -> None:
    """Print the rows: mean and range over the seeds."""
    found = list(_rows("accuracy"))
    table = Table(
        "contender", "accuracy", "least to most", "seeds", "weights", "minutes, no teacher", title="ResNet-56 teaches"
    )
    for name in dict.fromkeys(row["contender"] for row in found):
        mine = [row for row in found if row["contender"] == name]
        reached = [row["accuracy"] for row in mine]
        weights = ", ".join(f"{weight:g}" for weight in mine[0]["weights"])
        minutes = statistics.mean(row["seconds_without_teacher"] for row in mine) / 60
        spread = f"{min(reached):.2f} to {max(reached):.2f}"
        table.add_row(name, f"{statistics.mean(reached):.2f}", spread, str(len(mine)), weights, f"{minutes:.1f}")
    Console(width=120).print(table)


def main() -> None:
    """Train what `bench/results/distillation.json` does not have yet, seed by seed, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    given = parser.parse_args()
    if not given.table:
        with rows.alone():
            likeness()
            for seed in given.seeds:
                for contender in CONTENDERS:
                    if seed in contender.seeds and (not given.only or contender.name in given.only):
                        measure(contender, seed)
                shutil.rmtree(folder().parent / "distillation" / f"teacher-{seed}", ignore_errors=True)
    show()


if __name__ == "__main__":
    main()
