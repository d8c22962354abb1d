from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lsq.json").read_text())

seeds = st.integers(0, 2**31)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learned(grid, scale, zero_point=None, **options):
    scale = torch.as_tensor(scale)
    quantizer = FakeQuantize(grid, len(scale) if scale.ndim else None).learn_step(**options)
    quantizer.set_grid(scale, None if zero_point is None else torch.as_tensor(zero_point))
    return quantizer


def slowly(values, step, zero, grid, gradients, learns_offset=False):
    """Rounded values, and gradients of values, step and offset, computed value by value as in the papers."""
    shown, of_values, of_step, of_offset = [], [], 0.0, 0.0
    for value, gradient in zip(values, gradients, strict=True):
        reached = value / step + zero
        if reached < grid.minimum or reached > grid.maximum:
            end = grid.minimum if reached < grid.minimum else grid.maximum
            shown.append((end - zero) * step)
            of_values.append(0.0)
            of_step += gradient * (end if learns_offset else end - zero)
            of_offset += gradient
        else:
            shown.append(round(value / step) * step)
            of_values.append(gradient)
            of_step += gradient * (round(value / step) - value / step)
    return shown, of_values, of_step, of_offset


@given(seeds, st.sampled_from([2, 4, 8]), st.floats(0.05, 2), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_single_learned_step_equals_the_formula(seed, bits, step, offset):
    grid = Grid.unsigned(bits)
    zero = float(seed % (grid.maximum + 1))
    values, gradients = draw(seed, 3, 7), draw(seed + 1, 3, 7)
    values.requires_grad_()
    quantizer = learned(grid, torch.tensor(step), torch.tensor(zero), offset=offset, of_images=True)
    shown = quantizer(values)
    shown.backward(gradients)
    step32 = float(quantizer.scale.detach())
    told = slowly(values.flatten().tolist(), step32, zero, grid, gradients.flatten().tolist(), offset)
    factor = (7 * grid.maximum) ** -0.5
    assert shown.flatten().tolist() == pytest.approx(told[0], abs=1e-4)
    assert values.grad.flatten().tolist() == pytest.approx(told[1], abs=1e-5)
    assert float(quantizer.scale.grad) == pytest.approx(told[2] * factor, rel=1e-3, abs=1e-3)
    if offset:
        assert float(quantizer.learned_step.offset.grad) == pytest.approx(told[3] * factor, rel=1e-3, abs=1e-3)


@given(seeds, st.sampled_from([2, 3, 8]))
@settings(max_examples=10, deadline=None)
def test_a_learned_step_per_channel_equals_the_formula(seed, bits):
    grid = Grid.signed(bits)
    weight, gradients = draw(seed, 3, 2, 5), draw(seed + 1, 3, 2, 5)
    weight.requires_grad_()
    steps = torch.tensor([0.1, 0.5, 2.0])
    quantizer = learned(grid, steps)
    shown = quantizer(weight)
    shown.backward(gradients)
    factor = (10 * grid.maximum) ** -0.5
    for channel, step in enumerate(steps.tolist()):
        rows = (each[channel].flatten().tolist() for each in (weight.detach(), gradients))
        values, given_gradients = rows
        told = slowly(values, step, 0.0, grid, given_gradients)
        assert shown[channel].flatten().tolist() == pytest.approx(told[0], abs=1e-5)
        assert weight.grad[channel].flatten().tolist() == pytest.approx(told[1], abs=1e-6)
        assert float(quantizer.scale.grad[channel]) == pytest.approx(told[2] * factor, rel=1e-3, abs=1e-4)


def test_the_kernel_of_torch_has_the_same_gradients_except_near_the_ends():
    """It rounds before it clips, so that values up to half a step beyond the ends count as inside."""
    values = draw(0, 4, 50)
    beyond = ((values > -0.1) & (values < 0)) | ((values > 15 * 0.2) & (values < 15.5 * 0.2))
    values[beyond] = 1.0
    values.requires_grad_()
    quantizer = learned(Grid.unsigned(4), torch.tensor(0.2))
    quantizer(values).square().sum().backward()
    ours = values.grad.clone(), quantizer.scale.grad
    values.grad = None
    scale = torch.tensor([0.2], requires_grad=True)
    shown = torch._fake_quantize_learnable_per_tensor_affine(
        values, scale, torch.zeros(1), 0, 15, (values.numel() * 15) ** -0.5
    )
    shown.square().sum().backward()
    torch.testing.assert_close(ours[0], values.grad)
    torch.testing.assert_close(ours[1].reshape(1), scale.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN["cases"].values(), ids=GOLDEN["cases"])
def test_values_and_gradients_equal_those_of_reference_code(case):
    """The reference scales the step's gradient by the number of all values; here by that of one channel or image."""
    told = {key: torch.tensor(value) for key, value in case.items() if isinstance(value, list)}
    values, step = told["values"].requires_grad_(), told["step"]
    activation = case["minimum"] == 0
    quantizer = learned(
        Grid(case["minimum"], case["maximum"]), step if len(step) > 1 else step[0], of_images=activation
    )
    shown = quantizer(values)
    shown.backward(told["gradient"])
    torch.testing.assert_close(shown.detach(), told["shown"], rtol=0, atol=1e-5)
    torch.testing.assert_close(values.grad, told["of_values"], rtol=0, atol=1e-6)
    shared = len(values) if activation else len(step)  # the factor by which the reference counts too many
    expected = told["of_step"] * shared**0.5
    torch.testing.assert_close(quantizer.scale.grad.flatten(), expected, rtol=1e-4, atol=1e-5)


def test_a_disabled_quantizer_returns_its_input():
    values = draw(0, 3, 3)
    assert FakeQuantize(Grid.signed(4)).learn_step()(values) is values


def test_a_learned_step_rounds_like_a_fixed_step():
    values = draw(0, 200)
    quantizer = learned(Grid.unsigned(4), torch.tensor(0.13), torch.tensor(5.0))
    expected = torch.fake_quantize_per_tensor_affine(values, 0.13, 5, 0, 15)
    torch.testing.assert_close(quantizer(values).detach(), expected)


@torch.no_grad()
def test_a_step_stays_positive_and_the_zero_point_follows_the_offset():
    quantizer = learned(Grid.unsigned(4), torch.tensor(0.1), torch.tensor(3), offset=True)
    assert float(quantizer.learned_step.offset) == pytest.approx(-0.3)
    quantizer.learned_step.offset.fill_(-0.52)
    quantizer.follow_step()
    assert int(quantizer.zero_point) == 5
    quantizer.learned_step.offset.fill_(-40.0)
    quantizer.scale.fill_(-2.0)
    quantizer.follow_step()
    assert 0 < float(quantizer.scale) < 1e-5
    assert int(quantizer.zero_point) == 15


def test_the_network_can_change_the_output_in_place():
    values = torch.randn(4, 8)
    gradients = []
    for add in (torch.Tensor.add, torch.Tensor.add_):
        quantizer = learned(Grid.unsigned(4), torch.tensor(0.2), of_images=True)
        inputs = values.clone().requires_grad_()
        add(quantizer(inputs), 1).square().sum().backward()
        gradients.append((inputs.grad, quantizer.scale.grad))
    for plain, in_place in zip(*gradients, strict=True):
        assert torch.equal(plain, in_place)
