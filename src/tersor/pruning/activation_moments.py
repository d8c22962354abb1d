"""Moments of layer inputs over a sample of positions."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

_POSITIONS = 16
_RIDGE = 1e-3
_MAX_FEATURES = 4608
"""Covariances of layers with more input features (512 channels, 3 x 3) are not computed."""


class InputMoments:
    """Running sums of input features, their squares (features,) and products (features, features).

    The mean of the first positions is subtracted: single precision would lose the covariance beside a large mean.
    """

    def __init__(self) -> None:
        self.count = 0
        self.reference: Tensor | None = None
        self.sum: Tensor | None = None
        self.squares: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Add (positions, features)."""
        features = inputs.shape[1]
        if self.reference is None or self.sum is None or self.squares is None:
            self.reference = inputs.mean(0)
            self.sum, self.squares = inputs.new_zeros(features), inputs.new_zeros(features)
            self.products = inputs.new_zeros(features, features) if features <= _MAX_FEATURES else None
        inputs = inputs - self.reference
        self.count += len(inputs)
        self.sum += inputs.sum(0)
        self.squares += inputs.square().sum(0)
        if self.products is not None:
            self.products.addmm_(inputs.T, inputs)

    @property
    def sufficient(self) -> bool:
        """Whether more positions change nothing: there are enough, or no covariance is computed."""
        return self.products is None or self.count >= 2 * len(self.products)

    @property
    def mean(self) -> Tensor:
        """(features,), double, on the CPU."""
        assert self.reference is not None
        return self.reference.cpu().double() + self._offset

    @property
    def variance(self) -> Tensor:
        """(features,), double, on the CPU."""
        assert self.squares is not None
        return (self.squares.cpu().double() / self.count - self._offset.square()).clamp(min=0)

    def covariance(self, features: int) -> Tensor | None:
        """Covariance of all features, double, on the CPU; None with fewer than 2 * `features` positions."""
        if self.products is None or self.count < 2 * features:
            return None
        return self.products.cpu().double() / self.count - self._offset[:, None] * self._offset

    @property
    def _offset(self) -> Tensor:
        assert self.sum is not None
        return self.sum.cpu().double() / self.count


def add_ridge(covariance: Tensor) -> Tensor:
    """Add a thousandth of the mean variance to the diagonal, in place."""
    least = torch.finfo(torch.float32).tiny
    covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean().clamp(min=least))
    return covariance


@contextmanager
def removed_afterwards(hooks: Iterable[RemovableHandle]) -> Generator[None]:
    """Remove hooks at the end of the block."""
    hooks = [*hooks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reads_all_channels(graph: fx.GraphModule, name: str) -> bool:
    """Whether the layer is fully connected or a convolution without groups."""
    layer = graph.get_submodule(name)
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def sampled_inputs(layer: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """(positions, features): the inputs of `layer` at a few positions, in the order of its weight."""
    if not isinstance(layer, nn.Conv2d):
        tokens = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return tokens[:, _sample(tokens.shape[1], generator).to(inputs.device)].flatten(0, 1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode)  # pyright: ignore[reportPrivateUsage]
    reach = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    height, width = (
        (size - far - 1) // stride + 1 for size, far, stride in zip(padded.shape[2:], reach, layer.stride, strict=True)
    )
    positions = _sample(height * width, generator).to(inputs.device)
    starts = positions // width * layer.stride[0], positions % width * layer.stride[1]
    rows, columns = (
        start[:, None] + step * torch.arange(size, device=inputs.device)
        for start, step, size in zip(starts, layer.dilation, layer.kernel_size, strict=True)
    )
    return padded[:, :, rows[:, :, None], columns[:, None, :]].movedim(2, 1).flatten(0, 1).flatten(1)


def _sample(positions: int, generator: torch.Generator) -> Tensor:
    """Up to 16 positions."""
    return torch.randperm(positions, generator=generator)[:_POSITIONS]
