import pytest
import torch

from tersor.core.errors import InputError
from tersor.data.network_inputs import TensorInputs, joined_inputs, same_sizes, several_inputs, tensors_of

LEFT, RIGHT = torch.zeros(2, 3), torch.ones(2, 3)


def test_batches_are_joined_by_name():
    found = joined_inputs(
        [TensorInputs({"left": LEFT, "right": RIGHT}), TensorInputs({"right": RIGHT, "left": LEFT})]
    ).kwargs
    assert torch.equal(found["left"], torch.zeros(4, 3))
    assert torch.equal(found["right"], torch.ones(4, 3))


def test_joining_batches_with_different_names_raises():
    with pytest.raises(InputError, match="takes the inputs left, but a batch has right"):
        joined_inputs([TensorInputs({"left": LEFT}), TensorInputs({"right": RIGHT})])


def test_several_inputs_behave_like_images():
    whole = TensorInputs((torch.arange(6).view(3, 2), torch.ones(3, 1, dtype=torch.float64)))
    assert (whole.shape, whole.ndim, whole.dtype, whole.device.type) == ((3, 2), 2, torch.int64, "cpu")
    assert whole.is_floating_point()
    assert not TensorInputs((torch.arange(3),)).is_floating_point()
    assert [each.dtype for each in whole.float().all()] == [torch.int64, torch.float32]
    assert [each.dtype for each in whole.to(torch.zeros(1, dtype=torch.float16)).all()] == [torch.int64, torch.float16]
    assert [each.dtype for each in whole.to(torch.device("cpu")).all()] == [torch.int64, torch.float64]
    copied = whole.clone()
    copied.all()[0][0] = 9
    assert whole.all()[0][0].tolist() == [0, 1]
    assert [each.requires_grad for each in whole.clone().requires_grad_().all()] == [False, True]
    assert all(each.is_contiguous() for each in TensorInputs((torch.zeros(3, 2).T,)).contiguous().all())
    assert [each.tolist() for each in whole.cpu().all()] == [each.tolist() for each in whole.all()]


def test_which_values_are_recognized_as_several_inputs():
    found = several_inputs({"left": LEFT, "right": RIGHT})
    assert list(found.kwargs) == ["left", "right"]
    assert len(several_inputs([LEFT, RIGHT]).args) == 2
    for other in (LEFT, [], [LEFT, 3], [torch.zeros(())], [torch.zeros(3, 4, 4)] * 2, "text", {}):
        assert several_inputs(other) is None
    assert several_inputs({"a": torch.zeros(3, 4, 4)}) is not None, "in a dict, three dimensions are no image"
    assert several_inputs([torch.zeros(3, 4, 4), torch.zeros(3)]) is not None
    with pytest.raises(InputError, match=r"the shapes \(2, 3\), \(1, 3\)"):
        several_inputs([LEFT, RIGHT[:1]])


def test_comparing_sizes_and_joining_batches_in_order():
    assert same_sizes(LEFT, torch.zeros(9, 3))
    assert not same_sizes(LEFT, torch.zeros(2, 4))
    pair = TensorInputs((LEFT, RIGHT))
    assert same_sizes(pair, TensorInputs((LEFT[:1], RIGHT[:1])))
    assert not same_sizes(pair, LEFT)
    assert joined_inputs([LEFT, RIGHT]).tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
    assert [each.tolist() for each in joined_inputs([pair, pair]).args] == [[[0] * 3] * 4, [[1] * 3] * 4]
    assert tensors_of(LEFT)[0] is LEFT
    assert tensors_of(pair)[1] is RIGHT
    with pytest.raises(InputError, match="a batch has 2 tensors"):
        joined_inputs([TensorInputs({"left": LEFT}), pair])
