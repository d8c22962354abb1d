"""The dense path of a masked network (DCIL): the same weights without masks, with BatchNorms and a head of its own.

`torch.func.functional_call` swaps the path's own tensors in by name for one call, so that the path also runs through a
captured graph with further parametrizations.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.graph.batchnorm import Norm
from tersor.graph.forward_call import run
from tersor.graph.layer_selection import weighted_layers
from tersor.graph.parametrization import parametrized
from tersor.pruning.mask import Mask
from tersor.quantization.fake_quantize import quantizers_disabled


@contextmanager
def masks_and_quantizers_disabled(model: nn.Module) -> Generator[None]:
    """Use dense weights, and quantize neither weights nor activations."""
    masks = [each for each in model.modules() if isinstance(each, Mask)]
    for mask in masks:
        mask.dense = True
    try:
        with quantizers_disabled(model):
            yield
    finally:
        for mask in masks:
            mask.dense = False


class _Copy(nn.Module):
    """Copies of the tensors of one module, under their names there."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self.path = path
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))
        if parametrize.is_parametrized(module, "weight"):
            weight = parametrized(module).original
            assert isinstance(weight, Tensor)
            self.register_parameter("weight", nn.Parameter(weight.detach().clone()))
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer.clone())

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """The copies, by the names of the originals in `model`."""
        module = model.get_submodule(self.path)
        tensors: dict[str, Tensor] = {}
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            key = f"parametrizations.{name}.original" if parametrize.is_parametrized(module, name) else name
            tensors[f"{self.path}.{key}"] = value
        return tensors


class DensePathModules(nn.Module):
    """The dense path's own copies of every BatchNorm and of the head, the last convolution or fully connected layer.

    Args:
        model: the network; its tensors are copied.
        masked: the layers with masks, by name; a masked head is shared. None: everything is shared.
    """

    def __init__(self, model: nn.Module, masked: Iterable[str] | None) -> None:
        super().__init__()
        copied: list[tuple[str, nn.Module]] = []
        if masked is not None:
            copied = [(name, each) for name, each in model.named_modules() if isinstance(each, Norm)]
            *_, head = weighted_layers(model).items()
            copied += [head] if head[0] not in set(masked) else []
        self.parts = nn.ModuleList(_Copy(path, module) for path, module in copied)

    def dense_outputs(self, model: nn.Module, *inputs: Any) -> Any:
        """The outputs of the dense path, for the inputs of the network."""
        own: dict[str, Tensor] = {}
        for part in self.parts:
            assert isinstance(part, _Copy)
            own |= part.named(model)
        with masks_and_quantizers_disabled(model):
            with_own = lambda *args, **kwargs: torch.func.functional_call(model, own, args, kwargs)  # noqa: E731
            return run(with_own, *inputs)
