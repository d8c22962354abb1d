from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tersor.quantization.grid import Grid, affine_parameters, symmetric_scale, to_integers

bits = st.integers(2, 8)
values = st.floats(-1e6, 1e6, width=32)
BYTES = Grid.unsigned(8)


@pytest.mark.parametrize(("number", "ends"), [(2, (-1, 1)), (4, (-7, 7)), (8, (-127, 127))])
def test_signed_grids_are_symmetric(number, ends):
    grid = Grid.signed(number)
    assert (grid.minimum, grid.maximum) == ends
    assert grid.bits == number


@pytest.mark.parametrize(("number", "end"), [(2, 3), (4, 15), (8, 255)])
def test_unsigned_grids_begin_at_zero(number, end):
    grid = Grid.unsigned(number)
    assert (grid.minimum, grid.maximum) == (0, end)
    assert grid.bits == number


@given(st.floats(2**-100, 2**100, width=32), bits)
def test_the_largest_value_is_the_last_point_of_the_grid(largest, number):
    grid = Grid.signed(number)
    scale = symmetric_scale(torch.tensor(largest), grid)
    assert to_integers(torch.tensor([largest, -largest]), scale, torch.tensor(0), grid).tolist() == [
        grid.maximum,
        grid.minimum,
    ]


@given(st.lists(values, min_size=1, max_size=20), bits)
@example([0.0], 8)
@example([3.0, 5.0], 8)
@example([-3.0, -5.0], 2)
def test_every_value_in_the_range_is_within_half_a_step_and_zero_is_exact(numbers, number):
    grid = Grid.unsigned(number)
    tensor = torch.tensor(numbers)
    scale, zero_point = affine_parameters(tensor.min(), tensor.max(), grid)
    assert scale > 0
    assert zero_point.dtype == torch.int32
    assert grid.minimum <= zero_point <= grid.maximum
    assert to_integers(torch.tensor(0.0), scale, zero_point, grid) == zero_point
    shown = (to_integers(tensor, scale, zero_point, grid) - zero_point) * scale
    # the zero point was rounded too, which moves the ends by half a step at most
    assert (shown - tensor).abs().max() <= scale * 1.0001


@pytest.mark.parametrize("width", [0.0, 1e-45, 1e-39])
def test_a_range_of_zero_width_has_scale_1(width):
    assert symmetric_scale(torch.tensor(width), Grid.signed(8)) == 1
    scale, zero_point = affine_parameters(torch.tensor(0.0), torch.tensor(width), BYTES)
    assert (scale.item(), zero_point.item()) == (1, 0)


def test_positive_ranges_begin_at_zero_and_negative_ones_end_there():
    scale, zero_point = affine_parameters(torch.tensor(2.0), torch.tensor(2.55), BYTES)
    torch.testing.assert_close(scale, torch.tensor(0.01))
    assert zero_point == 0
    scale, zero_point = affine_parameters(torch.tensor(-2.55), torch.tensor(-2.0), BYTES)
    torch.testing.assert_close(scale, torch.tensor(0.01))
    assert zero_point == 255


def test_ties_are_rounded_to_even():
    halves = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert to_integers(halves, torch.tensor(1.0), torch.tensor(0), Grid.signed(8)).tolist() == [-2, -2, 0, 0, 2, 2]


@given(st.lists(values, min_size=1, max_size=20), st.integers(-20, 20), st.integers(0, 255))
def test_rounding_equals_exact_rational_arithmetic(numbers, exponent, zero_point):
    scale = 2.0**exponent  # a power of two, so that the division is exact in float32 too
    found = to_integers(torch.tensor(numbers), torch.tensor(scale), torch.tensor(zero_point), BYTES)
    expected = [min(255, max(0, round(Fraction(number) / Fraction(scale)) + zero_point)) for number in numbers]
    assert found.tolist() == expected


def test_scales_are_broadcast_over_channels():
    weight = torch.tensor([[1.0, -2.0], [10.0, 5.0]])
    scale = symmetric_scale(weight.abs().amax(1), Grid.signed(8))
    integers = to_integers(weight, scale[:, None], torch.tensor(0), Grid.signed(8))
    assert integers.dtype == torch.int32
    assert integers.tolist() == [[64, -127], [127, 64]]  # 63.5 is rounded to even
