"""Training in bfloat16 only if the networks run in it.

Autocast converts the inputs of convolutions and matrix products. Some operators then get two data types and fail
(`torch.lerp`, `index_add`, `zeros(...)[:, 0] = x`, `nn.Bilinear`), in a network that trains well in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn

from tersor.core.device import precision_for
from tersor.data.network_inputs import NetworkInput
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.training.options import Training

_FAILURES = (RuntimeError, TypeError)

Options = TypeVar("Options", bound=Training)


def with_usable_precision(
    training: Options, networks: Mapping[str, nn.Module | None], images: NetworkInput, say: Callable[[str], object]
) -> Options:
    """The options, with float32 in place of `auto` if a network runs in float32 but not in bfloat16.

    Args:
        training: the options of a training run.
        networks: the networks that will run, by name.
        images: a few images (N, C, H, W).
        say: receives a note if float32 is used.
    """
    precision = precision_for(images.device, training.precision)
    if precision is None or training.precision != "auto":
        return training
    for name, network in networks.items():
        if network is None:
            continue
        error = _error(network, images, precision)
        if error is not None and _error(network, images, None) is None:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"{name} does not run under bfloat16 autocast ({reason.rstrip('.')}): training in float32")
            return training.model_copy(update={"precision": "float32"})
    return training


def _error(network: nn.Module, images: NetworkInput, precision: torch.dtype | None) -> Exception | None:
    """The error of a forward pass in eval mode."""
    kind = images.device.type
    try:
        with evaluating(network), torch.no_grad(), torch.autocast(kind, precision, enabled=precision is not None):
            run(network, images.clone())
    except _FAILURES as error:
        return error
    return None
