import pytest
import torch

from tersor.core.errors import InputError
from tersor.data.network_inputs import TensorInputs, joined_inputs

LEFT, RIGHT = torch.zeros(2, 3), torch.ones(2, 3)


def test_batches_are_joined_by_name():
    found = joined_inputs(
        [TensorInputs({"left": LEFT, "right": RIGHT}), TensorInputs({"right": RIGHT, "left": LEFT})]
    ).kwargs
    assert torch.equal(found["left"], torch.zeros(4, 3))
    assert torch.equal(found["right"], torch.ones(4, 3))


def test_batches_of_other_names_are_refused():
    with pytest.raises(InputError, match="takes the inputs left, but a batch has right"):
        joined_inputs([TensorInputs({"left": LEFT}), TensorInputs({"right": RIGHT})])
