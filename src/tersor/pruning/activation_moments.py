"""What layers read, a few positions of every image, and their moments; what is read off the answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_POSITIONS = 16
_RIDGE = 1e-3
_MOST = 4608
"""Numbers that a position of a layer may read for their products to be kept: 512 channels, 3 by 3."""


class ReadMoments:
    """Sums over positions of what a layer reads and of its squares, (numbers,), and products, (numbers, numbers).

    What is summed is the difference from the mean of the first positions: a mean that is large beside the spread would
    leave nothing of a covariance in single precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self.about: Tensor | None = None
        self.sum: Tensor | None = None
        self.squares: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, seen: Tensor) -> None:
        """Takes in (positions, numbers)."""
        numbers = seen.shape[1]
        if self.about is None or self.sum is None or self.squares is None:
            self.about, self.sum, self.squares = seen.mean(0), seen.new_zeros(numbers), seen.new_zeros(numbers)
            self.products = seen.new_zeros(numbers, numbers) if numbers <= _MOST else None
        seen = seen - self.about
        self.count += len(seen)
        self.sum += seen.sum(0)
        self.squares += seen.square().sum(0)
        if self.products is not None:
            self.products.addmm_(seen.T, seen)

    @property
    def enough(self) -> bool:
        """Whether more positions would tell nothing new: they are enough, or there are too many numbers for any."""
        return self.products is None or self.count >= 2 * len(self.products)

    @property
    def mean(self) -> Tensor:
        """(numbers,), as double, on the CPU."""
        assert self.about is not None
        return self.about.cpu().double() + self._off

    @property
    def variance(self) -> Tensor:
        """(numbers,), as double, on the CPU."""
        assert self.squares is not None
        return (self.squares.cpu().double() / self.count - self._off.square()).clamp(min=0)

    def covariance(self, numbers: int) -> Tensor | None:
        """(all, all), as double, on the CPU; None where the positions are too few to tell `numbers` apart."""
        if self.products is None or self.count < 2 * numbers:
            return None
        return self.products.cpu().double() / self.count - self._off[:, None] * self._off

    @property
    def _off(self) -> Tensor:
        assert self.sum is not None
        return self.sum.cpu().double() / self.count


def with_ridge(covariance: Tensor) -> Tensor:
    """The same with a thousandth of its mean variance added to each; in place."""
    least = torch.finfo(torch.float32).tiny
    covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean().clamp(min=least))
    return covariance


def centred(logits: Tensor) -> Tensor:
    """(N, K, ...) less their mean over K; (N, 1) and (N,) as they are."""
    return logits if logits.ndim < 2 or logits.shape[1] == 1 else logits - logits.mean(1, keepdim=True)


def reads_whole(graph: fx.GraphModule, name: str) -> bool:
    """Whether every output of the layer reads every channel."""
    layer = graph.get_submodule(name)
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def read(layer: nn.Module, given: Tensor, drawn: torch.Generator) -> Tensor:
    """(positions, numbers): what `layer` reads of `given` at a few of its positions, in the order of its weight."""
    if not isinstance(layer, nn.Conv2d):
        tokens = given.reshape(len(given), -1, given.shape[-1])
        return tokens[:, _some(tokens.shape[1], drawn).to(given.device)].flatten(0, 1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(given, layer._reversed_padding_repeated_twice, mode)  # pyright: ignore[reportPrivateUsage]
    reach = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    height, width = (
        (size - far - 1) // stride + 1 for size, far, stride in zip(padded.shape[2:], reach, layer.stride, strict=True)
    )
    places = _some(height * width, drawn).to(given.device)
    starts = places // width * layer.stride[0], places % width * layer.stride[1]
    rows, columns = (
        start[:, None] + step * torch.arange(size, device=given.device)
        for start, step, size in zip(starts, layer.dilation, layer.kernel_size, strict=True)
    )
    return padded[:, :, rows[:, :, None], columns[:, None, :]].movedim(2, 1).flatten(0, 1).flatten(1)


def _some(positions: int, drawn: torch.Generator) -> Tensor:
    """All positions, or a few where there are many."""
    return torch.randperm(positions, generator=drawn)[:_POSITIONS]
