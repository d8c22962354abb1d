"""Fake quantization: values rounded to a grid, in floating point, on a weight or on an edge of the graph.

What moves a grid during training is a part of its quantizer: an observer, whose statistics give the grid (QAT), or a
learned step (LSQ). All of it is in the `state_dict`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.graph.parametrization import parametrizations_of
from tersor.quantization.grid import Grid, affine_parameters
from tersor.quantization.observers import weight_grid
from tersor.quantization.range_tracking import MovingAverage, WeightShare, scale_shape
from tersor.quantization.straight_through import fake_quantize, fake_quantize_learned

_SMALLEST_STEP = 1e-6


class LearnedStep(nn.Module):
    """Marks a quantizer whose scale is a Parameter; holds the offset if it is learned.

    Args:
        channels: number of steps; None for one step for the whole tensor.
        offset: whether an offset is learned; the zero point is this offset, rounded to an integer.
        of_images: whether dimension 0 is the batch; the number of values that share a step is then that of one image.
    """

    offset: Tensor | None

    def __init__(self, channels: int | None = None, *, offset: bool = False, of_images: bool = False) -> None:
        super().__init__()
        self.of_images = of_images
        self.register_parameter("offset", nn.Parameter(torch.zeros(scale_shape(channels))) if offset else None)


class FakeQuantize(nn.Module):
    """Rounds values to a grid, in floating point; returns them unchanged until `set_grid` has enabled it.

    The gradient passes straight through inside the range. Whether it is enabled is part of the `state_dict`.

    Args:
        grid: the integers to round to.
        channels: number of scales, along dimension 0; None for one scale for the whole tensor.

    Attributes:
        enabled: whether values are rounded.
        scale: difference between two neighboring values, (channels,) or a single number.
        zero_point: the integer for 0, of the shape of `scale`.
        observer: follows the range of the values while the network is trained.
        learned_step: marks that `scale` is trained.
    """

    scale: Tensor
    zero_point: Tensor
    observer: MovingAverage | WeightShare | None
    learned_step: LearnedStep | None

    def __init__(self, grid: Grid, channels: int | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.channels = channels
        self.enabled = False
        self.register_buffer("scale", torch.ones(scale_shape(channels)))
        self.register_buffer("zero_point", torch.zeros(scale_shape(channels), dtype=torch.int32))
        self.register_module("observer", None)
        self.register_module("learned_step", None)

    @property
    def is_calibrated(self) -> bool:
        """Whether its grid was set; it may have been disabled since."""
        return self.enabled or bool((self.scale != 1).any())

    @property
    def is_trained(self) -> bool:
        """Whether a method of this stage moves its grid: its step is learned, or its range follows activations."""
        moves = isinstance(self.observer, MovingAverage) and self.observer.active
        return moves or self.learned_step is not None

    def track_activations(self, averaging: float) -> FakeQuantize:
        """Sets the grid in training mode from running means of minimum and maximum; see `MovingAverage`."""
        self.observer = MovingAverage(averaging).to(self.scale.device)
        return self

    def track_weight(self) -> FakeQuantize:
        """Sets the grid from the weight in `follow_weight`."""
        self.observer = WeightShare(self.channels).to(self.scale.device)
        return self

    def learn_step(self, *, offset: bool = False, of_images: bool = False) -> FakeQuantize:
        """Makes the scale, and the offset on request, Parameters; see `LearnedStep`."""
        self.observer = None
        self.learned_step = LearnedStep(self.channels, offset=offset, of_images=of_images).to(self.scale.device)
        scale = nn.Parameter(self.scale)
        del self.scale
        self.scale = scale
        self._reset_offset()
        return self

    @torch.no_grad()
    def fix_step(self) -> None:
        """Ends learning: the scale is a buffer again."""
        scale = self.scale.detach()
        del self.scale
        self.register_buffer("scale", scale)
        self.learned_step = None

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Sets `scale` and `zero_point`, scalars or (channels,), and enables rounding.

        Raises:
            InputError: one of them has another shape.
        """
        zero_point = torch.zeros_like(self.zero_point) if zero_point is None else torch.as_tensor(zero_point)
        for name, given in (("scale", torch.as_tensor(scale)), ("zero_point", zero_point)):
            if given.ndim:
                self._require_shape(name, given, scale_shape(self.channels))
            getattr(self, name).copy_(given)
        self._reset_offset()
        self.enabled = True

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Starts the moving averages at two scalars, and sets the grid that spans them; zero is always on it."""
        assert isinstance(self.observer, MovingAverage)
        self.observer.low.copy_(low)
        self.observer.high.copy_(high)
        self.set_grid(*affine_parameters(self.observer.low, self.observer.high, self.grid))

    def measure_share(self, weight: Tensor) -> None:
        """Measures the share of the range of `weight` (C, ...) that the grid spans now; 1 for a weight of zeros."""
        assert isinstance(self.observer, WeightShare)
        whole = weight_grid(weight, self.grid, per_channel=bool(self.scale.ndim))[0]
        nonzero = weight.flatten(1).any(1) if self.scale.ndim else weight.any()
        self.observer.share.copy_(torch.where(nonzero, self.scale / whole, 1.0))

    def follow_weight(self, weight: Tensor) -> None:
        """Sets the grid to the same share of the range of `weight` (C, ...)."""
        assert isinstance(self.observer, WeightShare)
        share = self.observer.share
        self.set_grid(*weight_grid(weight, self.grid, per_channel=bool(self.scale.ndim), share=share))

    @torch.no_grad()
    def follow_step(self) -> None:
        """After an optimizer step: keeps the learned scale above zero, and rounds the zero point from the offset."""
        self.scale.clamp_(min=_SMALLEST_STEP)
        if (offset := self._offset) is not None:
            zero_point = torch.round(-offset / self.scale).clamp(self.grid.minimum, self.grid.maximum)
            self.zero_point.copy_(zero_point)

    def forward(self, values: Tensor, *, moved: bool = False) -> Tensor:
        """Rounds `values` of any shape, or (channels, ...).

        If `moved`, the values were rounded by an earlier call and then reshaped or moved, and the observer skips them.

        Raises:
            InputError: the scale or the zero point was replaced by one of another shape.
        """
        if not self.enabled:
            return values
        shape = () if self.channels is None else tuple(values.shape[:1])
        self._require_shape("scale", self.scale, shape)
        self._require_shape("zero_point", self.zero_point, shape)
        if isinstance(self.observer, MovingAverage) and self.observer.active and self.training and not moved:
            self.set_range(*self.observer.next_range(values))
        if self.learned_step is None:
            return fake_quantize(values, self.scale, self.zero_point, self.grid)
        shared = values[0].numel() if self.learned_step.of_images else values.numel() // self.scale.numel()
        factor = (shared * self.grid.maximum) ** -0.5
        return fake_quantize_learned(values, self.scale, self._offset, self.zero_point, self.grid, factor)

    def get_extra_state(self) -> Tensor:
        """Whether rounding is enabled, and the grid, as a tensor, so that the `state_dict` holds them."""
        return torch.tensor([self.enabled, self.grid.minimum, self.grid.maximum])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` returned.

        Raises:
            RuntimeError: the loaded zero point is outside the grid.
        """
        enabled, minimum, maximum = state.tolist()
        if int(self.zero_point.min()) < minimum or int(self.zero_point.max()) > maximum:
            raise RuntimeError(f"a zero point outside its grid from {minimum} to {maximum}")
        self.enabled, self.grid = bool(enabled), Grid(minimum, maximum)

    def extra_repr(self) -> str:
        """Grid and number of scales."""
        return f"{self.grid.minimum}..{self.grid.maximum}, channels={self.scale.numel()}, enabled={self.enabled}"

    def _require_shape(self, name: str, given: Tensor, shape: tuple[int, ...]) -> None:
        if given.shape != shape:
            meaning = "one value per output channel" if shape else "one value for the whole tensor"
            raise InputError(
                f"{type(self).__name__}: {name} has the shape {tuple(given.shape)}. Pass one of the shape {shape}, "
                f"{meaning}."
            )

    @property
    def _offset(self) -> Tensor | None:
        return None if self.learned_step is None else self.learned_step.offset

    @torch.no_grad()
    def _reset_offset(self) -> None:
        if (offset := self._offset) is not None:
            offset.copy_(-self.zero_point * self.scale)


@contextmanager
def quantizers_disabled(model: nn.Module) -> Generator[None]:
    """Context in which neither weights nor activations of `model` are rounded. Masks stay."""
    enabled = [each for each in model.modules() if isinstance(each, FakeQuantize) and each.enabled]
    for quantizer in enabled:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enabled = True


def weight_quantizer(module: nn.Module) -> FakeQuantize | None:
    """The enabled quantizer of the module's weight, if there is one."""
    quantizers = (each for each in parametrizations_of(module) if isinstance(each, FakeQuantize))
    return next((each for each in quantizers if each.enabled), None)
