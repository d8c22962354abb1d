"""A network on disk, as its weights and the plan of what was laid on it: two files that no code is read from.

    FOLDER/model.safetensors     weights and buffers
    FOLDER/structure.json        cuts, masks, grids: what `structure.py` rebuilds from a new network of the class
    FOLDER/manifest.json         SHA-256 of both

A run's folder holds the same two, so that `load` reads it as well.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from tersor.checkpoint.artifact import read_folder, write_folder
from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.core.files import read_json
from tersor.graph.plain_network import plain_copy
from tersor.models import load_weights
from tersor.models.weights import save_weights

WEIGHTS, PLAN = "model.safetensors", "structure.json"


def save(model: nn.Module, folder: Path | str) -> Path:
    """Writes a network that was pruned, quantized or neither, whole or not at all.

        import tersor, torch
        from tersor.models import build

        images = torch.rand(8, 3, 32, 32)
        pruned = tersor.prune(build("resnet20", 10), images, keep_macs=0.5)
        tersor.save(pruned, "pruned")
        again = tersor.load(build("resnet20", 10), "pruned")
        assert torch.equal(again(images), pruned(images))

    Args:
        model: the network; it stays as it is.
        folder: must not exist.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists or cannot be made, or on the network lies what no method of tersor laid.
    """
    plain = plain_copy(model, "what to save")
    return write_folder(folder, lambda partial: write_files(plain, partial))


def write_files(model: nn.Module, folder: Path) -> None:
    """Writes the two files into a folder that is there."""
    (folder / PLAN).write_text(json.dumps(structure(model)))
    save_weights(model, folder / WEIGHTS)


def load(fresh: nn.Module, folder: Path | str) -> nn.Module:
    """The network that `save`, or a run, left in a folder; in eval mode.

    Args:
        fresh: a new network of the class that was pruned or quantized; it stays as it is, and its weights do not
            matter.
        folder: that was written.

    Raises:
        InputError: the folder is none, is damaged, or holds what was made of another network.
    """
    plain = plain_copy(fresh, "the fresh network")
    folder = Path(folder)
    files = read_folder(folder)
    missing = [name for name in (WEIGHTS, PLAN) if name not in files]
    if missing:
        raise InputError(
            f"{folder} holds no {' and no '.join(missing)}. Give a folder that tersor.save or a run wrote."
        )
    try:
        model = rebuild(plain, read_json(files[PLAN], "Save the network again."))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    load_weights(model, files[WEIGHTS])
    return model.eval()
