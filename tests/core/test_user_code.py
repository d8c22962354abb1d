import functools
import sys

import pytest
import torch
from pydantic import BaseModel, Field

from tersor.core.errors import InputError
from tersor.core.user_code import user_code
from tersor.training.mask_attachment import mask_of


def divided(value):
    return 1 / value


def outer(value):
    return inner(value)


def inner(value):
    return divided(value)


@pytest.mark.parametrize("function", [outer, functools.partial(outer)])
def test_the_message_names_file_line_and_error(function):
    """The reported line is the last one in the user's module."""
    with pytest.raises(InputError) as raised, user_code("the loss outer", outer):
        function(0)
    line = divided.__code__.co_firstlineno + 1
    assert str(raised.value) == (
        f"the loss outer failed in {__file__}, line {line} (return 1 / value): ZeroDivisionError: division by zero"
    )
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


class Percentage(BaseModel):
    """A user's own record."""

    value: float = Field(le=100)
    unit: str


def percentage(value):
    return Percentage(value=value)


def test_a_pydantic_error_is_shown_in_one_line():
    line = percentage.__code__.co_firstlineno + 1
    with pytest.raises(InputError) as raised, user_code("the metric percentage", percentage):
        percentage(101)
    assert str(raised.value) == (
        f"the metric percentage failed in {__file__}, line {line} (return Percentage(value=value)): ValidationError: "
        "Percentage.value: Input should be less than or equal to 100, got 101; Percentage.unit: Field required"
    )


class Base:
    def update(self, value):
        return divided(value)


def test_an_error_in_a_base_class_of_another_module_is_reported_as_user_code():
    own = type("Own", (Base,), {"__module__": "elsewhere"})()
    message = rf"the metric Own failed in {__file__}, line \d+ .*: ZeroDivisionError"
    with pytest.raises(InputError, match=message), user_code("the metric Own", own):
        own.update(0)


def out_of_memory():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def refused():
    raise InputError("already clear")


@pytest.mark.parametrize(("function", "error"), [(out_of_memory, RuntimeError), (refused, InputError)])
def test_errors_with_their_own_message_are_not_changed(function, error):
    with pytest.raises(error) as raised, user_code("the loss", function):
        function()
    assert "failed in" not in str(raised.value)


def without_mask():
    return mask_of(torch.nn.Conv2d(3, 4, 2))


def test_an_error_raised_by_tersor_in_a_users_function_is_reported_with_its_line():
    line = without_mask.__code__.co_firstlineno + 1
    with pytest.raises(InputError) as raised, user_code("outer", without_mask), user_code("attach", without_mask):
        without_mask()
    assert str(raised.value) == (
        f"attach failed in {__file__}, line {line} (return mask_of(torch.nn.Conv2d(3, 4, 2))): the layer Conv2d(3, 4, "
        "kernel_size=(2, 2), stride=(1, 1)) has no mask. Call insert_masks(layers, gradient, method) first."
    )


def test_an_error_outside_the_users_function_propagates():
    with pytest.raises(ZeroDivisionError), user_code("the loss", pytest.raises):
        divided(0)


class OfTorch(torch.nn.Module):
    def forward(self, value):
        return 1 / value


def test_an_error_in_a_module_of_tersor_propagates():
    own = type("Own", (OfTorch,), {"__module__": "tersor.methods.crd"})()
    OfTorch.__module__ = "tersor.methods.crd"
    with pytest.raises(ZeroDivisionError), user_code("the loss", own):
        own(0)


def test_a_function_that_exits_the_program_raises_one_error():
    def script():
        sys.exit(3)

    with pytest.raises(InputError, match=r"it exited the program \(sys\.exit, or an"), user_code("it", script):
        script()
