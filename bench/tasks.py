"""Compress networks of other tasks than classification, and measure each in its own metric in both runtimes.

A network is trained from scratch on bundled data, then quantized to 8 bits, or half of its MACs are removed and it is
fine-tuned for five epochs with itself as the teacher (with the targets alone if it has no logits), or both. The last
epoch counts. The test images only report. The UNet is also halved by the verbs, by a loop in plain PyTorch, and by
torch-pruning with the same loop. Run it where segmentation-models-pytorch is installed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peers
import rows
import tables
import tersor
import training
from images import folder
from task_networks import SUBJECTS, Subject
from tersor.data import Batches
from tersor.evaluation.costs import costs
from tersor.evaluation.scoring import agreement, file_predictions, score, targets_of
from tersor.evaluation.session import open_session
from tersor.recipe import Recipe, write

RESULT = "tasks"
EPOCHS = 5
"""Of fine-tuning after channels were removed."""
KEEP = 0.5
DRAWS = 3
"""Draws of 300 calibration images."""
LOOPS = ("verbs", "verbs, AdamW", "own loop", "torch-pruning")
"""Other ways than the recipe to halve the UNet."""
Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")


def kept(recipe: Recipe, way: str, make: Callable[[], nn.Module]) -> Path:
    """Return the folder of the network that `make` returns; an existing one is taken."""
    digest = hashlib.sha256(f"{way}\n{write(recipe)}".encode()).hexdigest()[:16]
    place = folder().parent / f"{RESULT}-made" / digest
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        tersor.save(make(), place)
    return place


@cache
def trained(subject: Subject, seed: int) -> Path:
    """Return the folder of the network after its training."""
    optimizer = {"name": "adamw", "learning_rate": subject.learning_rate}
    recipe = subject.recipe({"epochs": subject.epochs, "optimizer": optimizer}, seed)
    return kept(recipe, "recipe", lambda: training.walked(recipe, RESULT, subject.data())[0].model)


@cache
def network(subject: Subject, seed: int, way: str | None) -> nn.Module:
    """Return the trained network, or the one with half of its MACs: through the recipe, the verbs or a loop."""
    folder_of_original = trained(subject, seed)
    teacher = tersor.load(subject.fresh(), folder_of_original)
    if way is None:
        return teacher
    optimizer = {"name": "adamw", "learning_rate": subject.learning_rate / 3}
    methods: list[Any] = [{"channel_pruning": {"keep_macs": KEEP}}]
    if subject.taught:
        methods.append({"soft_targets": {"temperature": 2, "loss_weight": 0.5, "label_weight": 0.5}})
    stage = {"epochs": EPOCHS, "optimizer": optimizer, "methods": methods}
    recipe = subject.recipe(stage, seed, folder_of_original / "model.safetensors")
    batches = subject.batches(seed)

    def by_the_verbs(**options: Any) -> nn.Module:
        pruned = tersor.prune(teacher, batches, keep_macs=KEEP)
        return tersor.distill(pruned, teacher, batches, epochs=EPOCHS, task=subject.task, **options)

    as_in_the_recipe: dict[str, Any] = {"optimizer": "adamw", "learning_rate": subject.learning_rate / 3}
    as_in_the_recipe |= {"temperature": 2, "loss_weight": 0.5, "label_weight": 0.5}

    made: dict[str, Callable[[], nn.Module]] = {
        "recipe": lambda: training.walked(recipe, RESULT, subject.data())[0].model,
        "verbs": lambda: by_the_verbs(learning_rate=0.02),
        "verbs, AdamW": lambda: by_the_verbs(**as_in_the_recipe),
        "own loop": lambda: tuned(tersor.prune(teacher, batches, keep_macs=KEEP), teacher, subject, batches),
    }
    if way == "torch-pruning":  # `tersor.load` could not rebuild it
        return tuned(torch_pruned(teacher, example(subject)), teacher, subject, batches)
    return tersor.load(subject.fresh(), kept(recipe, way, made[way]))


def tuned(student: nn.Module, teacher: nn.Module, subject: Subject, batches: Batches) -> nn.Module:
    """Fine-tune as the recipe does, in plain PyTorch and float32."""
    task, steps = subject.goal(), EPOCHS * len(batches)
    optimizer = torch.optim.AdamW(student.parameters(), lr=subject.learning_rate / 3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for batch in batches:
            outputs = student.train()(batch.images)
            with torch.no_grad():
                wanted = F.log_softmax(teacher.eval()(batch.images) / 2, 1)
            soft = F.kl_div(F.log_softmax(outputs / 2, 1), wanted, log_target=True, reduction="none").sum(1).mean()
            optimizer.zero_grad()
            (0.5 * 4 * soft + 0.5 * task.loss(outputs, batch.targets)).backward()
            optimizer.step()
            schedule.step()
    return student.eval()


def torch_pruned(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy from which torch-pruning removed channels until half of the MACs are left, in multiples of 4."""
    import torch_pruning

    wanted = KEEP * torch_pruning.utils.count_ops_and_params(model, images[:1])[0]
    for percent in range(10, 90):
        small = copy.deepcopy(model).requires_grad_(True)
        heads = [layer for name, layer in small.named_modules() if name == "segmentation_head"]
        options = {"pruning_ratio": percent / 100, "round_to": 4, "ignored_layers": heads}
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        torch_pruning.pruner.BasePruner(small, images[:1], importance=importance, **options).step()
        if torch_pruning.utils.count_ops_and_params(small, images[:1])[0] <= wanted:
            return small
    raise AssertionError("torch-pruning keeps more than half of the MACs")


def example(subject: Subject) -> Tensor:
    """Return eight training images."""
    return next(iter(subject.batches(0, 8))).images.contiguous()


def files(subject: Subject, seed: int, way: str | None, maker: str, runtime: Runtime, scratch: Path) -> Iterator[Path]:
    """Write the file of a network: in float32, or in 8 bits for each draw of calibration images."""
    model = network(subject, seed, way)
    float32 = scratch / "float32.onnx"
    tersor.export(model, example(subject), float32, runtime=runtime)
    if maker == "float32":
        yield float32
        return
    for draw in range(DRAWS):
        images = next(iter(subject.batches(1000 + draw, 300))).images.contiguous()
        path = scratch / f"{draw}.onnx"
        if maker == "tersor":
            quantized = tersor.quantize(model, images.split(50), runtime=runtime, task=subject.task)
            tersor.export(quantized, images[:8], path, runtime=runtime)
        else:
            path = peers.post_training(maker, float32, images, path)
        yield path


def predictions(subject: Subject, path: Path, runtime: Runtime, *, float32: bool) -> Any:
    """Return the predictions of a file for all test images."""
    session = open_session(path, runtime, precision="float32" if float32 else None)
    batches = subject.test()
    return file_predictions(session, (batch.images.contiguous().numpy() for batch in batches), subject.goal())


@cache
def of_original(subject: Subject, seed: int, runtime: Runtime) -> Any:
    """Return the predictions of the original in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        (path,) = files(subject, seed, None, "float32", runtime, Path(scratch))
        return predictions(subject, path, runtime, float32=True)


def report(name: str, seed: int, way: str | None, maker: str, runtime: Runtime) -> None:
    """Write one row: the metric on all test images, and what was lost."""
    subject = SUBJECTS[name]
    identity = {"task": name, "network": subject.network, "removal": way, "weights": maker, "runtime": runtime}
    identity |= {"seed": seed, "epochs": subject.epochs, "versions": tables.versions()}
    if rows.known(RESULT, identity):
        return
    task, targets, reference = subject.goal(), targets_of(subject.test()), of_original(subject, seed, runtime)
    before = score(task, reference, targets)
    found, size = list[Any](), 0
    with tempfile.TemporaryDirectory() as scratch:
        for path in files(subject, seed, way, maker, runtime, Path(scratch)):
            found.append(predictions(subject, path, runtime, float32=maker == "float32"))
            size = sum(each.stat().st_size for each in path.parent.glob(f"{path.stem}.*"))
    scores = [score(task, each, targets) for each in found]
    after = statistics.mean(scores)
    lost = before - after if task.higher_is_better else after - before
    macs = [costs(network(subject, seed, each), example(subject)).macs for each in (None, way)]
    numbers = {
        "metric": task.metric,
        "score": after,
        "lost": lost,
        "agreement": statistics.mean(agreement(task, each, reference) for each in found),
        "macs_ratio": macs[1] / macs[0],
        "bytes": size,
        "test_images": len(subject.data().test),
    }
    rows.add(RESULT, identity, {**numbers, "n": len(scores), "spread": rows.spread(scores)}, [seed])
    print(f"{name} {seed}, {way}, {maker}, {runtime}: {after:.4f}, lost {lost:.4f}", flush=True)


def cases(names: list[str]) -> Iterator[tuple[str, int, str | None, str, Runtime]]:
    """Yield the task, the seed, the way of the removal, how the weights are stored, and the runtime of each row."""
    peer: dict[Runtime, str] = {"onnxruntime": "quantize_static", "openvino": "nncf"}
    for seed in range(max(SUBJECTS[name].seeds for name in names)):
        for name in (each for each in names if seed < SUBJECTS[each].seeds):
            for way in (None, "recipe"):
                for runtime in RUNTIMES:
                    for maker in ("float32", "tersor", peer[runtime]):
                        yield name, seed, way, maker, runtime
    if "segmentation" in names:
        for way in LOOPS:
            for runtime in RUNTIMES:
                yield "segmentation", 0, way, "float32", runtime


def show() -> None:
    """Print the mean over seeds, and the smallest and the largest loss."""
    table = Table("task", "removal", "weights", "runtime", "metric", "score", "lost", "smallest", "largest", "MACs")
    groups: dict[tuple[Any, ...], list[rows.Row]] = {}
    for row in rows.read(RESULT):
        key = tuple(row[each] for each in ("task", "removal", "weights", "runtime"))
        groups.setdefault(key, []).append(row)
    for key, members in groups.items():
        lost = [row["lost"] for row in members]
        values = (statistics.mean(row["score"] for row in members), statistics.mean(lost), min(lost), max(lost))
        ratio = statistics.mean(row["macs_ratio"] for row in members)
        cells = [f"{value:.3f}" for value in (*values, ratio)]
        table.add_row(*map(str, key), members[0]["metric"], *cells)
    Console(width=150).print(table)


def main() -> None:
    """Measure what `bench/results/tasks.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--removal", choices=["recipe", *LOOPS], help="only rows of networks that were halved this way")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        rows.commit()  # read now: the checkout may change within hours
        for case in cases(chosen.tasks):  # without `rows.alone`: nothing is timed
            if chosen.removal in {None, case[2]}:
                report(*case)
    show()


if __name__ == "__main__":
    main()
