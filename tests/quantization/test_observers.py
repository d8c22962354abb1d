from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.quantization.grid import Grid, affine_parameters, symmetric_scale, to_integers
from tersor.quantization.observers import Histogram, channel_maxima, weight_grid, without_saturation

seeds = st.integers(0, 2**31)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(*batches, bins=2048):
    histogram = Histogram(bins)
    for batch in batches:
        histogram.widen(batch)
    for batch in batches:
        histogram.count(batch)
    return histogram


def slow_counts(histogram, values):
    """Counts computed value by value in float64."""
    bins = histogram.counts.numel()
    low, high = float(histogram.low), float(histogram.high)
    counts = [0] * bins
    for value in values.flatten().tolist():
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    return counts


@given(seeds, st.integers(1, 4))
@settings(max_examples=20)
def test_a_histogram_counts_every_value_of_every_batch(seed, batches):
    parts = [draw(seed + i, 5, 7) * (i + 1) + i for i in range(batches)]
    histogram = filled(*parts, bins=16)
    values = torch.cat(parts)
    assert histogram.low == values.min().clamp(max=0)
    assert histogram.high == values.max().clamp(min=0)
    assert histogram.counts.sum() == values.numel()
    # a value very close to an edge can be counted on either side of it
    assert np.abs(np.cumsum(histogram.counts.numpy() - slow_counts(histogram, values))).max() <= 1


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-37])
def test_nearly_equal_values_are_counted(value):
    histogram = filled(torch.tensor([0.0, value, value]))
    assert histogram.counts.sum() == 3
    assert histogram.counts[0] >= 1


def test_zero_is_always_in_the_range():
    histogram = filled(torch.tensor([3.0, 5.0]))
    assert (histogram.low, histogram.high) == (0, 5)
    histogram = filled(torch.tensor([-3.0, -5.0]))
    assert (histogram.low, histogram.high) == (-5, 0)


@given(seeds, st.sampled_from([80.0, 99.0, 99.9]))
@settings(max_examples=20)
def test_percentiles_agree_with_sorted_values(seed, percent):
    values = draw(seed, 5000)
    histogram = filled(values[:2000], values[2000:])
    low, high = histogram.percentile(percent)
    ordered = sorted(values.tolist())
    left_out = round((100 - percent) / 200 * len(ordered))
    width = float(histogram.high - histogram.low) / histogram.counts.numel()
    assert ordered[left_out - 1] - width <= low <= ordered[left_out] + width
    assert ordered[-left_out - 1] - width <= high <= ordered[-left_out] + width


def test_percentile_100_clips_less_than_a_bin_and_lower_percentiles_clip_more():
    values = draw(0, 10_000)
    histogram = filled(values)
    width = (histogram.high - histogram.low) / histogram.counts.numel()
    kept = {percent: histogram.percentile(percent) for percent in (51.0, 90.0, 99.0, 100.0)}
    assert abs(kept[100.0][0] - values.min()) <= width
    assert abs(kept[100.0][1] - values.max()) <= width
    widths = [float(high - low) for low, high in kept.values()]
    assert widths == sorted(widths)


def test_the_percentile_range_of_positive_values_begins_at_zero():
    low, high = filled(draw(0, 1000).abs() + 1).percentile(90)
    assert low == 0
    assert high > 1


def slow_error(values, low, high, grid):
    scale, zero_point = (float(number) for number in affine_parameters(low, high, grid))
    error = 0.0
    for value in values.tolist():
        integer = min(max(round(value / scale) + zero_point, grid.minimum), grid.maximum)
        error += ((integer - zero_point) * scale - value) ** 2
    return error / len(values)


@given(seeds, st.sampled_from([2, 3, 4]))
@settings(max_examples=10)
def test_least_squares_finds_the_best_of_the_shrunk_ranges(seed, bits):
    grid = Grid.unsigned(bits)
    values = draw(seed, 600) ** 3  # heavy tails, so that clipping pays
    histogram = filled(values)
    found = slow_error(values, *histogram.least_squares(grid), grid)
    errors = {
        shrink: slow_error(values, histogram.low * shrink, histogram.high * shrink, grid)
        for shrink in np.linspace(0.1, 1, 91).tolist()
    }
    assert found <= min(errors.values()) * 1.02, "the histogram is as good as the values themselves"
    assert found < errors[1.0]


def test_channel_maxima_are_the_largest_absolute_values():
    weight = draw(0, 4, 3, 2, 2)
    assert channel_maxima(weight).tolist() == [max(abs(v) for v in row.flatten().tolist()) for row in weight]
    assert channel_maxima(draw(1, 5, 7)).shape == (5,)


def slow_weight_error(row, scale, grid):
    return sum(
        (min(max(round(value / scale), grid.minimum), grid.maximum) * scale - value) ** 2 for value in row.tolist()
    )


@given(seeds, st.sampled_from([2, 4, 8]))
@settings(max_examples=10)
def test_least_squares_finds_the_best_scale_for_each_channel(seed, bits):
    grid = Grid.signed(bits)
    weight = draw(seed, 3, 5, 3) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    scales, _ = weight_grid(weight, grid, weight_range="mse")
    for row, scale, full in zip(weight.flatten(1), scales.tolist(), channel_maxima(weight).tolist(), strict=True):
        tried = [slow_weight_error(row, full * shrink / grid.maximum, grid) for shrink in np.linspace(0.1, 1, 91)]
        assert slow_weight_error(row, scale, grid) <= min(tried) * 1.001


def test_least_squares_scale_of_a_channel_of_zeros_is_one():
    weight = torch.stack([torch.zeros(4), torch.ones(4)])
    assert weight_grid(weight, Grid.signed(8), weight_range="mse")[0].tolist()[0] == 1


@given(seeds, st.sampled_from([(4, 3, 3, 3), (4, 8), (4, 1, 3, 3), (4, 1)]), st.floats(0.01, 100))
@settings(max_examples=50)
def test_no_two_integers_of_a_channel_saturate_16_bits(seed, shape, factor):
    grid = Grid.signed(8)
    weight = draw(seed, *shape) * factor
    before = symmetric_scale(channel_maxima(weight), grid)
    scale = without_saturation(weight, before, grid)
    assert (scale >= before).all()
    column = scale.reshape(-1, *[1] * (weight.ndim - 1))
    integers = to_integers(weight, column, torch.tensor(0), grid).flatten(1)
    for row, old, new in zip(integers.tolist(), before.tolist(), scale.tolist(), strict=True):
        first, second, *_ = [*sorted((abs(value) for value in row), reverse=True), 0]
        assert 255 * (first + second) <= 2**15 - 1
        if new > old:
            assert first + second >= 126, "widened no further than needed"


def test_only_channels_that_would_saturate_are_widened():
    grid = Grid.signed(8)
    weight = torch.tensor([[1.0, 0.9, 0.1], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    before = symmetric_scale(channel_maxima(weight), grid)
    after = without_saturation(weight, before, grid)
    assert (after > before).tolist() == [True, False, False]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_with_fewer_than_8_bits_nothing_saturates(bits):
    grid = Grid.signed(bits)
    assert 255 * 2 * grid.maximum <= 2**15 - 1
    weight = torch.ones(3, 8)
    scale = symmetric_scale(channel_maxima(weight), grid)
    assert without_saturation(weight, scale, grid) is scale


def test_affine_grids_with_7_bits_do_not_saturate():
    grid = Grid.full(7)
    weight = draw(0, 3, 40).abs()  # all on one side of zero: integers minus their zero point reach 127
    scale, _ = weight_grid(weight, grid)
    wide = without_saturation(weight, scale, grid)
    assert (wide > scale).any()
    assert (weight / wide[:, None]).round().topk(2).values.sum(1).max() <= 128


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_an_affine_grid_uses_all_levels_within_the_range_of_a_channel(bits):
    grid = Grid.full(bits)
    weight = torch.stack([torch.linspace(-1, 3, 4000), torch.linspace(0.5, 2, 4000)])
    scale, zero_point = weight_grid(weight, grid)
    integers = to_integers(weight, scale[:, None], zero_point[:, None], grid)
    assert integers.unique().tolist() == list(range(grid.minimum, grid.maximum + 1))
    shown = (integers - zero_point[:, None]) * scale[:, None]
    assert ((shown - weight).abs() <= 0.51 * scale[:, None] + 1e-6).float().mean() > 0.95


def test_without_per_channel_there_is_one_scale():
    weight = draw(0, 4, 3, 3, 3) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    scale, zero_point = weight_grid(weight, Grid.signed(8), per_channel=False)
    assert scale.shape == zero_point.shape == ()
    assert float(scale) == pytest.approx(float(weight.abs().max()) / 127)


def test_the_percentile_range_clips_the_largest_weights():
    weight = torch.cat([draw(0, 1, 2000), torch.tensor([[50.0]])], dim=1)
    scale, _ = weight_grid(weight, Grid.signed(8), weight_range="percentile", percentile=99)
    ordered = weight.flatten().sort().values
    expected = max(-float(ordered[10]), float(ordered[-11]))
    assert float(scale) == pytest.approx(expected / 127, rel=1e-5)


def slow_divergence(histogram, low, high, grid):
    """Kullback-Leibler divergence between clipped values and the same values rounded, bin by bin."""
    scale, zero_point = (float(number) for number in affine_parameters(low, high, grid))
    centres, counts = histogram.centres.tolist(), histogram.counts.tolist()
    inside = [place for place, centre in enumerate(centres) if low <= centre <= high]
    clipped = {place: counts[place] for place in inside}
    clipped[inside[0]] += sum(counts[: inside[0]])
    clipped[inside[-1]] += sum(counts[inside[-1] + 1 :])
    levels = {}
    for place in inside:
        level = min(max(round(centres[place] / scale) + zero_point, grid.minimum), grid.maximum)
        levels.setdefault(level, []).append(place)
    rounded = {}
    for places in levels.values():
        held = [place for place in places if counts[place] > 0]
        rounded |= {place: sum(counts[each] for each in places) / len(held) for place in held}
    all_clipped, all_rounded = sum(clipped.values()), sum(rounded.values())
    terms = (
        (found / all_clipped, max(rounded.get(place, 0) / all_rounded, 1e-9))
        for place, found in clipped.items()
        if found
    )
    return sum(p * np.log(p / q) for p, q in terms)


@given(seeds, st.sampled_from([3, 4]))
@settings(max_examples=5, deadline=None)
def test_entropy_finds_the_shrunk_range_with_the_smallest_divergence(seed, bits):
    grid = Grid.unsigned(bits)
    histogram = filled(draw(seed, 800).abs() ** 2, bins=256)
    found = slow_divergence(histogram, *histogram.least_divergence(grid), grid)
    tried = [
        slow_divergence(histogram, histogram.low * shrink, histogram.high * shrink, grid)
        for shrink in torch.linspace(1, 0.1, 91)
    ]
    assert found == pytest.approx(min(tried), rel=1e-6)
    assert found < tried[0]
