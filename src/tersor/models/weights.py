"""Weights files: safetensors, and PyTorch checkpoints that need no code to be read. A model is changed whole or not.

What a file says about itself (safetensors metadata) is text by name. tersor reads `normalize_mean` and
`normalize_std` there: how the network wants its images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from tersor.core.errors import InputError
from tersor.core.files import replacing
from tersor.models.weights_candidates import chosen
from tersor.models.weights_files import read_tensors
from tersor.models.weights_mismatch import is_counter

Channels = tuple[float, float, float]


def load_weights(model: nn.Module, path: str | Path) -> dict[str, str]:
    """Loads a file into `model`, whose tensors keep their data types and devices.

    Args:
        model: the network; it is left untouched if anything is wrong.
        path: a `.safetensors` file, or a PyTorch checkpoint: a state_dict, or a dict that holds one, also under a
            prefix (`module.`, `model.`), and with weights under weight_norm, spectral_norm or `torch.nn.utils.prune`.

    Returns:
        The file's metadata; and `taken`, the part of the file that was loaded, where it holds more than that.

    Raises:
        InputError: the file is missing, corrupt, no weights file, refused, made for another network, or holds several
            sets of weights of this one.
    """
    found, metadata = read_tensors(Path(path))
    expected = model.state_dict()
    tensors, taken = chosen(str(path), found, model)
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_meta:
            raise InputError(f"'{path}': {key} is a sparse tensor, or one without values. Save dense weights.")
        if value.is_complex() or (expected[key].is_floating_point() and not value.is_floating_point()):
            raise InputError(f"'{path}': {key} is of {value.dtype}, and the network has {expected[key].dtype} there.")
    metadata |= {"taken": taken} if taken else {}
    # files older than PyTorch 0.4.1 have no counters of batches
    counters = {key: value for key, value in expected.items() if is_counter(key)}
    model.load_state_dict({**counters, **tensors})
    return metadata


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the `state_dict` of `model` as safetensors: a new file under another name, then renamed.

    Args:
        model: the network.
        path: ends with `.safetensors`; its folder is made if need be.
        metadata: what the file says about itself.

    Raises:
        InputError: `path` ends with something else.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(
            f"weights are written as safetensors. Write '{path.with_suffix('.safetensors')}', not '{path}'."
        )
    # safetensors refuses tensors that share memory, so each is a copy
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(_in_one_order(save(tensors, dict(metadata or {}))))


def _in_one_order(file: bytes) -> bytes:
    """The same safetensors file with sorted metadata: the library writes them in another order every time, and the
    same weights should give the same bytes. Layout: 8 bytes of length, a JSON header of that length, the tensors.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


def normalization(metadata: Mapping[str, str]) -> tuple[Channels, Channels] | None:
    """Mean and standard deviation of each RGB channel, of pixels in [0, 1]; None where `metadata` has neither.

    Raises:
        InputError: one is there without the other, or they are not three numbers.
    """
    if "normalize_mean" not in metadata and "normalize_std" not in metadata:
        return None
    mean, std = (_channels(metadata, key) for key in ("normalize_mean", "normalize_std"))
    if min(std) <= 0:
        raise InputError(f"normalize_std in the weights' metadata is '{metadata['normalize_std']}': 0 or less.")
    return mean, std


def _channels(metadata: Mapping[str, str], key: str) -> Channels:
    text = metadata.get(key, "")
    try:
        red, green, blue = (float(number) for number in text.split(","))
    except ValueError:
        red = green = blue = float("nan")
    if not all(isfinite(number) for number in (red, green, blue)):
        raise InputError(f"{key} in the weights' metadata is '{text}'. Possible: three numbers, as in '0.5,0.5,0.5'.")
    return red, green, blue
