"""Load and save weights: safetensors, and PyTorch checkpoints that can be read without running code.

The safetensors metadata `normalize_mean` and `normalize_std` state how the network's images are normalized.
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
from tersor.data.mean_and_std import Channels
from tersor.models.weights_files import read_tensors
from tersor.models.weights_matching import is_counter, match


def load_weights(model: nn.Module, path: str | Path) -> dict[str, str]:
    """Load a file into `model`, whose tensors keep their data types and devices.

    Args:
        model: the network; unchanged if an error is raised.
        path: a `.safetensors` file, or a PyTorch checkpoint: a state_dict or a dict that holds one. Keys may have a
            prefix (`module.`, `model.`), and weights may be saved by weight_norm, spectral_norm or
            `torch.nn.utils.prune`.

    Returns:
        The file's metadata, and `taken`: the part that was loaded, if the file holds more than the network.

    Raises:
        InputError: the file is missing, damaged, not a weights file, would run code, fits another network, or holds
            several sets of weights of this network.
    """
    state_dicts, metadata = read_tensors(Path(path))
    expected = model.state_dict()
    tensors, taken = match(str(path), state_dicts, model)
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_meta:
            raise InputError(f"'{path}': {key} is a sparse tensor or has no values. Save dense weights.")
        wanted = expected[key]
        if value.is_complex() != wanted.is_complex() or (wanted.is_floating_point() and not value.is_floating_point()):
            raise InputError(
                f"'{path}': {key} is {value.dtype} in the file and {wanted.dtype} in the network. Save it in "
                "the network's data type."
            )
    metadata |= {"taken": taken} if taken else {}
    # PyTorch saves batch counters since version 0.4.1
    counters = {key: value for key, value in expected.items() if is_counter(key)}
    try:
        model.load_state_dict({**counters, **tensors})
    except RuntimeError as error:
        raise InputError(f"'{path}' is damaged: {str(error)[:300]}. Copy or save it again.") from error
    return metadata


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Save the `state_dict` of `model` as safetensors, whole or not at all.

    Args:
        model: the network.
        path: ends with `.safetensors`; its folder is created if necessary.
        metadata: text by name, stored in the file.

    Raises:
        InputError: `path` has another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(
            f"weights are saved as safetensors. Write '{path.with_suffix('.safetensors')}' instead of '{path}'."
        )
    # copies, because safetensors refuses tensors that share memory
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(_deterministic(save(tensors, dict(metadata or {}))))


def _deterministic(file: bytes) -> bytes:
    """Sort the metadata of a safetensors file, whose order is random, so that equal weights give equal bytes.

    Layout: 8 bytes of length, a JSON header of that length, the tensors.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


def normalization(metadata: Mapping[str, str]) -> tuple[Channels, Channels] | None:
    """Return mean and standard deviation of each channel in [0, 1], or None if `metadata` has neither.

    Raises:
        InputError: one is missing, or they are not numbers.
    """
    if "normalize_mean" not in metadata and "normalize_std" not in metadata:
        return None
    mean, std = (_channels(metadata, key) for key in ("normalize_mean", "normalize_std"))
    if len(mean) != len(std):
        raise InputError(
            "normalize_mean and normalize_std in the weights' metadata have different lengths, "
            f"{len(mean)} and {len(std)}. Both need one number per channel."
        )
    if min(std) <= 0:
        raise InputError(
            f"normalize_std in the weights' metadata is '{metadata['normalize_std']}'. Possible: numbers above 0."
        )
    return mean, std


def _channels(metadata: Mapping[str, str], key: str) -> Channels:
    text = metadata.get(key, "")
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = (float("nan"),)
    if not all(isfinite(number) for number in numbers):
        raise InputError(
            f"{key} in the weights' metadata is '{text}'. Write one number per channel, as in '0.5,0.5,0.5'."
        )
    return numbers
