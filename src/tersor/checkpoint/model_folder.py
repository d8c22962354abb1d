"""Save and load a compressed network: its weights and its structure, two data files without code.

    FOLDER/model.safetensors     weights and buffers
    FOLDER/structure.json        removed channels, masks, quantizers; see `structure.py`
    FOLDER/manifest.json         SHA-256 of both

The folder of a run holds the same files, so `load` reads it too. It also reads a checkpoint of a run.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from tersor.checkpoint.artifact import read_folder, write_folder
from tersor.checkpoint.checkpoint_folder import CLOCK, read
from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.core.files import read_json
from tersor.graph.plain_network import plain_copy
from tersor.models import load_weights
from tersor.models.weights import save_weights

WEIGHTS, PLAN = "model.safetensors", "structure.json"


def save(model: nn.Module, folder: Path | str) -> Path:
    """Save a network, compressed or not, atomically.

        import tersor, torch
        from tersor.models import build

        images = torch.rand(8, 3, 32, 32)
        pruned = tersor.prune(build("resnet20", 10), images, keep_macs=0.5)
        tersor.save(pruned, "pruned")
        again = tersor.load(build("resnet20", 10), "pruned")
        assert torch.equal(again(images), pruned(images))

    Args:
        model: the network; it is not changed.
        folder: the folder to write; it must not exist.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists or cannot be created, or the network has parametrizations that are not tersor's.
    """
    plain = plain_copy(model, "the network")
    return write_folder(folder, lambda partial: write_files(plain, partial))


def write_files(model: nn.Module, folder: Path) -> None:
    """Write the two files into an existing folder."""
    (folder / PLAN).write_text(json.dumps(structure(model)))
    save_weights(model, folder / WEIGHTS)


def load(fresh: nn.Module, folder: Path | str) -> nn.Module:
    """Load the network that `save` or a run wrote, or that of a checkpoint; it is returned in eval mode.

    Args:
        fresh: a new network of the same class and size as the one before compression. It is not changed, and its
            weights do not matter.
        folder: the folder to read; for the network after a stage, `OUT/checkpoints/01-NAME-end-...`.

    Raises:
        InputError: the folder was not written by `save` or a run, is damaged, or belongs to another network.
    """
    plain = plain_copy(fresh, "the fresh network")
    folder = Path(folder)
    if (folder / CLOCK).is_file():
        return _of_checkpoint(plain, folder).eval()
    files = read_folder(folder)
    missing = [name for name in (WEIGHTS, PLAN) if name not in files]
    if missing:
        raise InputError(
            f"{folder} holds no {' and no '.join(missing)}. Pass a folder written by tersor.save or a run."
        )
    try:
        model = rebuild(plain, read_json(files[PLAN], "Save the network again."))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    load_weights(model, files[WEIGHTS])
    return model.eval()


def _of_checkpoint(fresh: nn.Module, folder: Path) -> nn.Module:
    checkpoint = read(folder)
    if checkpoint is None:
        raise InputError(f"the checkpoint {folder} is damaged, or its folder was renamed. Pass another one.")
    try:
        model = rebuild(fresh, checkpoint.structure())
        model.load_state_dict(checkpoint.network())
    except (InputError, RuntimeError) as error:
        raise InputError(f"the checkpoint {folder} belongs to another network: {str(error)[:300]}") from error
    return model
