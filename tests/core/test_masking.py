import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.masking import masks, unit_scores


def slowly(scores, sparsity):
    """The mask, one weight at a time: the lowest goes, of equal ones the last; the best stays."""
    alive = list(range(len(scores)))
    best = max(alive, key=lambda index: (scores[index], -index))
    for _ in range(min(round(sparsity * len(scores)), len(scores) - 1)):
        alive.remove(min((index for index in alive if index != best), key=lambda index: (scores[index], -index)))
    return [index in alive for index in range(len(scores))]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.floats(0, 0.95))
def test_the_lowest_go_and_ties_go_by_index(values, sparsity):
    scores = torch.tensor(values, dtype=torch.float32)
    found = masks({"a": scores}, {"a": torch.Size([len(values)])}, sparsity, "layer")["a"]
    assert found.tolist() == slowly(values, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsity_is_exact(sparsity, scope):
    shapes = {"a": torch.Size([8, 3, 3, 3]), "b": torch.Size([16, 8, 3, 3])}
    scores = {name: torch.rand(shape).flatten() for name, shape in shapes.items()}
    found = masks(scores, shapes, sparsity, scope)
    together = [list(shapes)] if scope == "global" else [["a"], ["b"]]
    for names in together:
        total = sum(shapes[name].numel() for name in names)
        assert sum(int((~found[name]).sum()) for name in names) == round(sparsity * total)


def test_global_takes_from_where_the_scores_are_low_but_leaves_a_survivor():
    shapes = {"low": torch.Size([4, 1, 1, 1]), "high": torch.Size([12, 1, 1, 1])}
    scores = {"low": torch.full((4,), 0.1), "high": torch.arange(12) + 1.0}
    found = masks(scores, shapes, 0.5, "global")
    assert int(found["low"].sum()) == 1
    assert int((~found["high"]).sum()) == 5


def test_filters_are_masked_whole_and_at_least_as_many_as_asked():
    weight = torch.rand(10, 4, 3, 3)
    found = masks({"a": unit_scores(weight, "filter")}, {"a": weight.shape}, 0.25, "layer")["a"]
    dead = ~found.flatten(1).any(1)
    assert found.shape == weight.shape
    assert int(dead.sum()) == 3
    assert torch.equal(found.flatten(1).all(1), ~dead)
    assert weight.flatten(1).mean(1)[dead].max() < weight.flatten(1).mean(1)[~dead].min()


def test_the_best_unit_of_a_layer_stays():
    scores = torch.tensor([0.2, 0.9, 0.1])
    assert masks({"a": scores}, {"a": torch.Size([3, 1, 1, 1])}, 0.99, "layer")["a"].flatten().tolist() == [0, 1, 0]
