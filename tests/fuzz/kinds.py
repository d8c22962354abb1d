"""The six kinds of file from other people that tersor reads: example files, and the function that reads each kind."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import warnings
import zipfile
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutation import MARKER, Kind, Random, bytes_changed, digest, json_changed, text_changed, values_changed
from PIL import Image
from safetensors.torch import save
from torch import nn

import tersor
from tersor import recipe as recipes
from tersor.checkpoint.checkpoint_folder import CLOCK, STRUCTURE, TENSORS
from tersor.checkpoint.store import Checkpoints
from tersor.core.progress import NullProgress
from tersor.data.decoding import ImageFormat, read_file
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.ptq import PTQ
from tersor.methods.weight_pruning import WeightPruning
from tersor.models import load_weights
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages, stage_models
from tersor.recipe import parse
from tersor.recipe.yaml import load, plain
from tersor.report.page import write_report
from tersor.training.context import AttachContext
from tersor.training.method import chain

ROOT = Path(__file__).parents[2]
_BETWEEN = b"\n--- part ---\n"
_IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class _Payload:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARKER,)


class Tiny(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def _tiny() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().eval()


# recipes


_WORDS = (
    *(
        "&a",
        "*a",
        "- *a",
        "{a: *a}",
        "? ",
        "!!python/object/apply:os.mkdir",
        "[[[[[[",
        "}",
        "]",
        "|",
        ">-",
        "---",
        "%YAML",
    ),
    *("1e999", "0xffffffffffffffffffff", "-1", "true", "null", ".nan", "~", "''", '"\\ud800"', "\t", "ptq:", "stages:"),
    *("resnet20", "{ptq: {bits: 99}}", "original", "2:4", "10000000000000000000000", "\u2028", "#", ": :", "teacher:"),
)


def _recipe_seeds() -> list[bytes]:
    shipped = sorted((ROOT / "recipes").glob("*.yaml"))
    return [
        path.read_bytes().replace(b"???", b"given") for path in shipped
    ]  # replaces the values that a user has to set


def _recipe_changed(content: bytes, draw: Random) -> bytes:
    if draw.random() < 0.4:
        return text_changed(content, draw, _WORDS)
    return json.dumps(values_changed(plain(load(content.decode(), "seed")), draw)).encode()  # JSON is YAML


def _read_recipe(content: bytes, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    parse(recipes.write(recipes.read(path)), "again")


# weights


def _weight_seeds() -> list[bytes]:
    state = _tiny().state_dict()
    whole, old = io.BytesIO(), io.BytesIO()
    torch.save(state, whole)
    torch.save({"state_dict": state, "epoch": 3}, old, _use_new_zipfile_serialization=False)
    payload = pickle.dumps(_Payload(), protocol=2)
    smuggled = io.BytesIO()
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(smuggled, "w") as target:
        for name in source.namelist():
            target.writestr(name, payload if name.endswith("data.pkl") else source.read(name))
    other = save(nn.Linear(4, 3).state_dict())
    return [
        save(state),
        other,
        whole.getvalue(),
        old.getvalue(),
        payload,
        pickle.dumps(_Payload()),
        smuggled.getvalue(),
    ]


def _weights_changed(content: bytes, draw: Random) -> bytes:
    if content[8:9] == b"{" and draw.random() < 0.6:
        return _header_changed(content, draw)
    if content.startswith(b"PK") and draw.random() < 0.6:
        return _member_changed(content, draw)
    return bytes_changed(content, draw)


def _member_changed(content: bytes, draw: Random) -> bytes:
    """A zip archive in which one file has other contents and a matching checksum."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(changed, "w") as target:
        names = source.namelist()
        chosen = draw.choice((draw.choice(names), next(name for name in names if name.endswith("data.pkl"))))
        for name in names:
            member = source.read(name)
            target.writestr(name, bytes_changed(member, draw) if name == chosen else member)
    return changed.getvalue()


def _header_changed(content: bytes, draw: Random) -> bytes:
    """A safetensors file with a changed header."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(values_changed(json.loads(content[8:end]), draw)).encode()
    length = len(header) if draw.random() < 0.9 else draw.choice((0, 1, 2**40, 2**63, len(header) + 8))
    return length.to_bytes(8, "little") + header + content[end:]


def _read_weights(content: bytes, folder: Path) -> None:
    problems: list[tersor.core.errors.InputError] = []
    for name in ("weights.safetensors", "weights.pt"):
        (folder / name).write_bytes(content)
        try:
            load_weights(_tiny(), folder / name)
        except tersor.core.errors.InputError as error:
            problems.append(error)
    if len(problems) == 2:
        raise problems[0]


# images


def _image_seeds() -> list[bytes]:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    seeds: list[bytes] = []
    for kind, options in (
        *(("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("BMP", {}), ("WEBP", {})),
        *(("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {})),
    ):
        found = io.BytesIO()
        pixels.save(found, kind, **options)
        seeds.append(found.getvalue())
    seeds.append(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(tersor_was_executed) (w) file closefile\nshowpage\n"
    )
    return seeds


def _read_image(content: bytes, folder: Path) -> None:
    path = folder / "image.png"
    path.write_bytes(content)
    with warnings.catch_warnings(action="ignore"):
        read_file(str(path), ImageFormat((8, 8)))
        read_file(str(path), ImageFormat())


# checkpoints


_RECIPE = """\
model: {name: "kinds:Tiny"}
data: {name: digits, limit: 40}
checkpoint_every: 1
stages:
  - {name: first, steps: 2, batch_size: 16, methods: [{weight_pruning: {sparsity: 0.5, every: 1}}]}
  - {name: second, steps: 2, batch_size: 16, ema: 0.9, validate_every: 1,
     optimizer: {name: adamw, learning_rate: 0.001},
     methods: [{qat: {calibration_images: 16}}]}
"""


@cache
def _experiment() -> Experiment:
    return prepare(parse(_RECIPE, "recipe.yaml"), model=None, data=None, progress=NullProgress())


_OF_CHECKPOINTS = (CLOCK, STRUCTURE, TENSORS)


def _checkpoint_seeds() -> list[bytes]:
    """The checkpoints of a run that was stopped before the end of its last stage."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept"
        checkpoints = Checkpoints(Path(folder) / "out.checkpoints")
        write = checkpoints.save

        def save_and_copy(unit: int, name: str, **told: Any) -> Path:
            path = write(unit, name, **told)
            shutil.copytree(path, kept / path.name, dirs_exist_ok=True)
            return path

        checkpoints.save = save_and_copy  # pyright: ignore[reportAttributeAccessIssue]
        run_stages(_experiment(), checkpoints, NullProgress())
        names = [path for path in sorted(kept.iterdir()) if path.name.startswith(("01-first-end", "02-second-0000001"))]
        assert len(names) == 2
        return [
            _BETWEEN.join(
                [path.name[:-9].encode(), *[(path / name).read_bytes() for name in (CLOCK, STRUCTURE, TENSORS)]]
            )
            for path in names
        ]


def _checkpoint_changed(content: bytes, draw: Random) -> bytes:
    name, clock, structure, tensors = content.split(_BETWEEN)
    match draw.randrange(4):
        case 0:
            clock = json_changed(clock, draw)
        case 1:
            structure = json_changed(structure, draw)
        case 2:
            tensors = _header_changed(tensors, draw)
        case _:
            tensors = bytes_changed(tensors, draw)
    if draw.random() < 0.8:  # as an attacker would, so that the checksum is correct
        try:
            told = json.loads(clock)
            told["sha256"].update({STRUCTURE: digest(structure), TENSORS: digest(tensors)})
            clock = json.dumps(told).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
    return _BETWEEN.join([name, clock, structure, tensors])


def _read_checkpoint(content: bytes, folder: Path) -> None:
    name, clock, structure, tensors = content.split(_BETWEEN)[:4]
    path = folder / "out.checkpoints" / f"{name.decode()}-{digest(clock)[:8]}"
    path.mkdir(parents=True)
    for file, of_file in zip(_OF_CHECKPOINTS, (clock, structure, tensors), strict=True):
        (path / file).write_bytes(of_file)
    experiment, checkpoints = _experiment(), Checkpoints(folder / "out.checkpoints")
    run_stages(experiment, checkpoints, NullProgress())
    stage_models(experiment, checkpoints)


# structure


_OF_FOLDERS = ("structure.json", "manifest.json", "model.safetensors")


@cache
def _laid() -> bytes:
    """A pruned, masked and quantized network, as written by `tersor.save`: weights and plan."""
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        methods = [ChannelPruning(keep_macs=0.7, round_to=1), WeightPruning(sparsity=0.5), PTQ()]
        attached = chain(methods, _tiny(), AttachContext(data=[_IMAGES]))
        attached.begin()
        path = tersor.save(attached.model, Path(folder) / "saved")
        return _BETWEEN.join(
            (path / name).read_bytes() for name in ("structure.json", "manifest.json", "model.safetensors")
        )


def _structure_changed(content: bytes, draw: Random) -> bytes:
    structure, manifest, weights = content.split(_BETWEEN)
    if draw.random() < 0.8:
        structure = json_changed(structure, draw)
        told = json.loads(manifest)
        told["files"]["structure.json"] = {"bytes": len(structure), "sha256": digest(structure)}
        manifest = json.dumps(told).encode()
    else:
        manifest = json_changed(manifest, draw)
    return _BETWEEN.join([structure, manifest, weights])


def _read_structure(content: bytes, folder: Path) -> None:
    for name, part in zip(
        ("structure.json", "manifest.json", "model.safetensors"), content.split(_BETWEEN), strict=False
    ):
        (folder / name).write_bytes(part)
    tersor.load(_tiny(), folder)


# numbers and evidence


class Page(HTMLParser):
    """Every element of a page with the names of its attributes, and what the page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[tuple[str, str]] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements |= {(tag, "")} | {(tag, name) for name, _ in attrs}
        self.loaded |= {
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "action", "srcset"}
        }


@cache
def _numbers_seed() -> bytes:
    sys.path.append(str(ROOT / "tests" / "report"))
    samples = importlib.import_module("samples")
    return json.dumps({"numbers": samples.numbers_of(), "evidence": samples.evidence_of()}).encode()


def _drawn(content: bytes, folder: Path) -> Page:
    try:
        told = json.loads(content)
        parts = {name: json.dumps(told[name]).encode() for name in ("numbers", "evidence")}
    except (ValueError, TypeError, KeyError, RecursionError):
        parts = {"numbers": content, "evidence": content}
    for name, part in parts.items():
        (folder / f"{name}.json").write_bytes(part)
    return Page(write_report(folder).read_text(encoding="utf-8"))


@cache
def _elements() -> set[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        return _drawn(_numbers_seed(), Path(folder)).elements


def _read_numbers(content: bytes, folder: Path) -> None:
    page = _drawn(content, folder)
    strange = page.elements - _elements()
    assert not strange, f"elements or attributes that no page has: {strange}"
    assert all(each.startswith("data:") for each in page.loaded), page.loaded


NAMES = ("recipe", "weights", "image", "checkpoint", "structure", "numbers")


@cache
def kind(name: str) -> Kind:
    """One of `NAMES`."""
    match name:
        case "recipe":
            return Kind(name, _recipe_seeds(), _recipe_changed, _read_recipe)
        case "weights":
            return Kind(name, _weight_seeds(), _weights_changed, _read_weights)
        case "image":
            return Kind(name, _image_seeds(), bytes_changed, _read_image)
        case "checkpoint":
            return Kind(name, _checkpoint_seeds(), _checkpoint_changed, _read_checkpoint)
        case "structure":
            return Kind(name, [_laid()], _structure_changed, _read_structure)
        case _:
            return Kind(name, [_numbers_seed()], json_changed, _read_numbers)
