"""Whether all outputs of a node are equal after a trial removal on a copy."""

import torch

from tersor.pruning.dependency.removal_check import _allclose


def test_every_output_of_a_node_is_compared():
    kept, moved = torch.ones(2, 3), torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert _allclose([kept, moved], (kept, moved))
    assert not _allclose([kept, kept], (kept, moved))
    assert not _allclose([kept, kept], (moved, kept))
    assert not _allclose([[kept], kept], ([moved], kept))


def test_shapes_and_integers_have_to_be_equal():
    assert not _allclose(torch.ones(2, 3), torch.ones(3, 2))
    assert not _allclose(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert _allclose(torch.ones(2, 0), torch.ones(2, 0))
