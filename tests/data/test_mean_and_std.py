from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tersor.core.errors import InputError
from tersor.data import Batches, load
from tersor.data.mean_and_std import channel_values


@pytest.mark.parametrize(
    "given", [(0.5, 0.25, 1), [0.5, 0.25, 1.0], np.array([0.5, 0.25, 1]), torch.tensor([0.5, 0.25, 1])]
)
def test_lists_arrays_and_tensors_are_converted_to_floats(given):
    found = channel_values("mean", given)
    assert found == (0.5, 0.25, 1.0)
    assert {*map(type, found)} == {float}
    assert load(name="digits", mean=given, std=given).std == found


@pytest.mark.parametrize("given", [0.5, 1, "0.5", ["0.5"] * 3, [None] * 3, {"red": 0.5}, [[0.5] * 3], np.array(0.5)])
def test_values_that_are_not_a_list_of_numbers_raise_the_same_error_everywhere(given):
    digits, three = load(name="digits"), (0.5, 0.5, 0.5)
    for name in ("mean", "std"):
        other = {"mean": three, "std": three, name: given}
        expected = (
            f"{name} is {given!r}. Write a list with one number for each channel, as in {name}=[0.49, 0.48, 0.45]."
        )
        for read in (
            lambda other=other: load(name="digits", **other),
            lambda other=other: replace(digits, **other),
            lambda other=other: Batches(digits.test, 8, **other),
        ):
            with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
                read()
