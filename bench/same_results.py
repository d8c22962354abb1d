"""Does a commit give the same results as another one: the demo, five shipped recipes, the numbers in the golden tests?

Each recipe runs as its own commit ships it, with 20 steps in every stage that trains. Recorded are the SHA-256 of
`model.onnx` and of the weights, and the accuracies. The demo runs in full. Results of one machine only compare with
results of the same machine, because another processor rounds differently.

    python bench/same_results.py record --commit 6082c3c
    python bench/same_results.py record
    python bench/same_results.py compare --commit 6082c3c
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import rows
from breaks import checked_out

RESULT = "same_results"
STEPS = 20
SHARED = rows.ROOT.parent / "shared"
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10-resnet56": {"model.weights": "resnet56"},
    "cifar10-resnet56-sparse": {"model.weights": "resnet56"},
    "cifar10-resnet20-distil": {"teacher.weights": "resnet56"},
    "papers/at-wrn-16-2-to-16-1": {},
}


def shortened(text: str, name: str, images: Path) -> dict[str, Any]:
    """Return a shipped recipe with 20 steps per stage, one epoch for a teacher, and the data and weights filled in."""
    recipe = YAML(typ="safe").load(text)
    for stage in recipe["stages"]:
        if stage.pop("epochs", None) or "steps" in stage:
            stage["steps"] = STEPS
            stage.pop("lr_schedule", None)
    if isinstance(recipe.get("teacher"), dict) and "epochs" in recipe["teacher"]:
        recipe["teacher"]["epochs"] = 1
        recipe["teacher"].get("training", {}).pop("lr_schedule", None)
    for key, network in SETTINGS[name].items():
        section, _, field = key.partition(".")
        recipe[section][field] = str(SHARED / "models" / f"{network}-cifar10-jpeg.safetensors")
    if name != "digits":
        recipe["data"] = {"folder": str(images), "augment": "crop_flip"}
    return recipe


def digest(path: Path) -> str:
    """Return the first 16 digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def results(folder: Path) -> dict[str, Any]:
    """Return the hashes and accuracies of a run."""
    numbers = json.loads((folder / "numbers.json").read_text())
    found = {"model.onnx": digest(folder / "model.onnx"), "original.onnx": digest(folder / "original.onnx")}
    weights = sorted(folder.glob("*.safetensors"))
    found |= {path.name: digest(path) for path in weights}
    # an accuracy, at commits before there were other metrics
    found["accuracy"] = [
        entry.get("score", entry.get("accuracy")) for entry in (numbers["original"], numbers["artifact"])
    ]
    found["validation"] = [
        stage.get("validation_score", stage.get("validation_accuracy")) for stage in numbers["stages"]
    ]
    return found


def record(commit: str) -> None:
    """Run everything that has no row yet for the commit."""
    with rows.alone(), checked_out(commit) as tree, tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(SHARED / "data" / "cifar10-jpeg.tar.gz") as packed:
            packed.extractall(scratch, filter="data")
        for name in ("demo", *SETTINGS):
            identity = {"tested": commit, "recipe": name}
            if rows.known(RESULT, identity):
                continue
            source = tree / "recipes" / f"{'digits' if name == 'demo' else name}.yaml"
            recipe = source
            if name != "demo":
                recipe = Path(scratch) / f"{source.stem}.yaml"
                with recipe.open("w") as file:
                    YAML().dump(shortened(source.read_text(), name, Path(scratch) / "cifar10-jpeg"), file)
            out = Path(scratch) / f"out-{source.stem}-{name == 'demo'}"
            command = [sys.executable, "-m", "tersor", "run", str(recipe), "--out", str(out)]
            environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
            subprocess.run(command, cwd=tree, env=environment, check=True)
            rows.add(RESULT, identity, {**results(out), "n": 1, "spread": None}, [0])


def compare(first: str, second: str) -> bool:
    """Print each recipe's results at both commits if they differ; return whether none does."""
    found = {
        commit: {row["recipe"]: row for row in rows.read(RESULT) if row["tested"] == commit}
        for commit in (first, second)
    }
    same = True
    for name in ("demo", *SETTINGS):
        before, after = (found[commit].get(name) for commit in (first, second))
        if before is None or after is None:
            print(f"{name}: no row for {first if before is None else second}")
            same = False
            continue
        keys = ["model.onnx", "original.onnx", "accuracy", "validation"]
        keys += [key for key in before if key.endswith(".safetensors")]
        changed = [key for key in keys if before.get(key) != after.get(key)]
        same = same and not changed
        print(f"{name}: {'same' if not changed else 'DIFFERENT: ' + ', '.join(changed)}  {after['model.onnx']}")
    return same


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("--commit", default="HEAD", help="for compare: the earlier commit, compared with HEAD")
    given = parser.parse_args()
    first, head = (
        subprocess.run(
            ["git", "-C", str(rows.ROOT), "rev-parse", "--short=12", commit], capture_output=True, text=True, check=True
        ).stdout.strip()
        for commit in (given.commit, "HEAD")
    )
    if given.action == "record":
        record(first)
    elif not compare(first, head):
        sys.exit(1)


if __name__ == "__main__":
    main()
