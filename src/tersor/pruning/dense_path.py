"""A second path through one network: the same modules and weights, but for parts that the path has for itself.

The parts are swapped in for the length of one call (`torch.func.functional_call`), by their names. So the path also
runs through a captured graph, and what runs is the same whatever was laid on the network since.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.graph.batchnorm import Norm
from tersor.graph.layer_selection import weighted_layers
from tersor.graph.parametrization import parametrized
from tersor.pruning.mask import Mask
from tersor.quantization.fake_quantize import quantizers_disabled


@contextmanager
def masks_and_quantizers_disabled(model: nn.Module) -> Generator[None]:
    """Masks of `model` show the weight as it is, and nothing is rounded: neither weights nor activations."""
    masks = [each for each in model.modules() if isinstance(each, Mask)]
    for mask in masks:
        mask.dense = True
    try:
        with quantizers_disabled(model):
            yield
    finally:
        for mask in masks:
            mask.dense = False


class _Part(nn.Module):
    """Copies of the tensors of one module, under their own names."""

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
        """The copies, by the names that the originals have in `model`."""
        module = model.get_submodule(self.path)
        found: dict[str, Tensor] = {}
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            shown = parametrize.is_parametrized(module, name)
            found[f"{self.path}.{f'parametrizations.{name}.original' if shown else name}"] = value
        return found


class OwnParts(nn.Module):
    """What the dense path of a masked network has for itself: every BatchNorm, and the head.

    Args:
        model: the network; its tensors are copied.
        masked: the layers that have masks, by name. The head, which is the last of the convolutions and fully
            connected layers, is shared where it has one. None: all is shared.
    """

    def __init__(self, model: nn.Module, masked: Iterable[str] | None) -> None:
        super().__init__()
        found: list[tuple[str, nn.Module]] = []
        if masked is not None:
            found = [(name, each) for name, each in model.named_modules() if isinstance(each, Norm)]
            *_, head = weighted_layers(model).items()
            found += [head] if head[0] not in set(masked) else []
        self.parts = nn.ModuleList(_Part(path, module) for path, module in found)

    def dense(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W), by the dense weights and the path's own parts."""
        own: dict[str, Tensor] = {}
        for part in self.parts:
            assert isinstance(part, _Part)
            own |= part.named(model)
        with masks_and_quantizers_disabled(model):
            return torch.func.functional_call(model, own, (images,))
