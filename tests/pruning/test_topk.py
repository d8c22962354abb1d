import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tersor.core.errors import InputError
from tersor.pruning.topk import check_granularity, masks, n_of_m, n_of_m_mask, top_k_mask, unit_scores


def slowly(scores, sparsity):
    """The mask, weight by weight: the lowest score is masked first, of equal ones the last; the best is kept."""
    alive = list(range(len(scores)))
    best = max(alive, key=lambda index: (scores[index], -index))
    for _ in range(min(round(sparsity * len(scores)), len(scores) - 1)):
        alive.remove(min((index for index in alive if index != best), key=lambda index: (scores[index], -index)))
    return [index in alive for index in range(len(scores))]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.floats(0, 0.95))
def test_the_lowest_scores_are_masked_and_ties_are_broken_by_index(values, sparsity):
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


def test_a_global_threshold_keeps_one_weight_in_every_layer():
    shapes = {"low": torch.Size([4, 1, 1, 1]), "high": torch.Size([12, 1, 1, 1])}
    scores = {"low": torch.full((4,), 0.1), "high": torch.arange(12) + 1.0}
    found = masks(scores, shapes, 0.5, "global")
    assert int(found["low"].sum()) == 1
    assert int((~found["high"]).sum()) == 5


def test_whole_filters_are_masked_to_at_least_the_sparsity():
    weight = torch.rand(10, 4, 3, 3)
    found = masks({"a": unit_scores(weight, "filter")}, {"a": weight.shape}, 0.25, "layer")["a"]
    dead = ~found.flatten(1).any(1)
    assert found.shape == weight.shape
    assert int(dead.sum()) == 3
    assert torch.equal(found.flatten(1).all(1), ~dead)
    assert weight.flatten(1).mean(1)[dead].max() < weight.flatten(1).mean(1)[~dead].min()


def test_the_unit_with_the_highest_score_is_never_masked():
    scores = torch.tensor([0.2, 0.9, 0.1])
    assert masks({"a": scores}, {"a": torch.Size([3, 1, 1, 1])}, 0.99, "layer")["a"].flatten().tolist() == [0, 1, 0]


def slowly_together(scores, sizes, sparsity, floor):
    """The masks, computed unit by unit from (score, layer, index)."""
    safe = {
        (layer, index)
        for layer, values in enumerate(scores)
        for place, index in enumerate(sorted(range(len(values)), key=lambda i: (-values[i], i)))
        if place == 0 or (place < math.ceil(floor * len(values)) and values[index] > -math.inf)
    }
    order = sorted(
        ((layer, index) for layer, values in enumerate(scores) for index in range(len(values))),
        key=lambda place: (scores[place[0]][place[1]], -place[0], -place[1]),
    )
    target, dropped = round(sparsity * sum(len(v) * s for v, s in zip(scores, sizes, strict=True))), set()
    for place in order:
        if place not in safe and target > 0:
            dropped.add(place)
            target -= sizes[place[0]]
    return [[(layer, i) not in dropped for i in range(len(values))] for layer, values in enumerate(scores)]


VALUES = st.one_of(st.integers(-2, 2).map(float), st.floats(-3, 3, width=32), st.just(-math.inf))


@given(
    st.lists(st.lists(VALUES, min_size=2, max_size=12), min_size=1, max_size=4),
    st.floats(0, 0.95),
    st.floats(0, 0.6),
    st.booleans(),
)
@example(values=[[0.0, 0.0], [-math.inf, 0.0]], sparsity=0.5, floor=0.5625, filters=False)  # masked before: goes first
def test_a_global_threshold_equals_a_slow_reference(values, sparsity, floor, filters):
    """Any finite scores and previously masked weights, with units of one or several weights."""
    sizes = [3 * (place + 1) if filters else 1 for place in range(len(values))]
    names = [str(place) for place in range(len(values))]
    scores = {name: torch.tensor(each) for name, each in zip(names, values, strict=True)}
    shapes = {name: torch.Size([len(v), s]) for name, v, s in zip(names, values, sizes, strict=True)}
    found = masks(scores, shapes, sparsity, "global", floor)
    assert [found[name][:, 0].tolist() for name in names] == slowly_together(values, sizes, sparsity, floor)


def test_scores_in_several_chunks_are_ranked_together():
    """More scores than one chunk holds, and most of them equal."""
    scores = torch.randint(0, 3, (200_000,), generator=torch.Generator().manual_seed(0)).float()
    kept = masks({"a": scores}, {"a": scores.shape}, 0.5, "layer")["a"]
    order = torch.sort(scores.flip(0), stable=True).indices
    dropped = 200_000 - 1 - order[:100_000]
    assert not kept[dropped].any()
    assert int(kept.sum()) == 100_000


def test_top_k_mask_selects_the_largest_values():
    assert top_k_mask(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), 1).tolist() == [[False, True], [False, False]]
    assert int(top_k_mask(torch.rand(3, 5), 0).sum()) == 0
    assert top_k_mask(torch.rand(3, 5), 15).all()


def test_a_global_threshold_needs_less_memory_than_twice_the_weights():
    """Including the scores; sorting would need eight times as much for the order alone."""
    weights = {f"layer{place}": torch.randn(512, 256, 3, 3) for place in range(3)}

    def found():
        scores = {name: weight.abs().flatten() for name, weight in weights.items()}
        return masks(scores, {name: weight.shape for name, weight in weights.items()}, 0.9, "global", 0.01)

    held = sum(weight.nbytes for weight in weights.values())
    assert most_allocated(lambda: [weight + 1 for weight in weights.values()]) == pytest.approx(held, rel=0.01)
    assert 1.2 * held < most_allocated(found) < 2 * held


def most_allocated(work):
    """The peak number of allocated bytes during a function."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    del kept
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_whole_kernels_are_masked():
    weight = torch.rand(6, 4, 3, 3)
    found = masks({"a": unit_scores(weight, "kernel")}, {"a": weight.shape}, 0.5, "layer")["a"]
    whole = found.flatten(2)
    assert torch.equal(whole.any(2), whole.all(2))
    assert int((~found).sum()) == weight.numel() // 2
    assert weight.mean((2, 3))[~whole.any(2)].max() < weight.mean((2, 3))[whole.any(2)].min()
    assert len(unit_scores(torch.rand(6, 4), "kernel")) == 24, "a fully connected layer's kernels are its weights"


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (3, 8)])
def test_n_of_every_m_input_channels_remain(kept, of):
    weight = torch.randn(5, 2 * of, 3, 3)
    found = n_of_m_mask(weight.abs(), kept, of)
    for out, row, column in ((0, 0, 0), (4, 2, 1), (2, 1, 2)):
        for start in (0, of):
            line = weight[out, start : start + of, row, column].abs().tolist()
            stay = sorted(range(of), key=lambda index, line=line: -line[index])[:kept]
            assert found[out, start : start + of, row, column].nonzero().flatten().tolist() == sorted(stay)
    assert n_of_m_mask(torch.ones(1, of), kept, of).tolist() == [[place < kept for place in range(of)]]


def test_valid_and_invalid_granularities():
    assert [check_granularity(text) for text in ("weight", "kernel", "filter", "2:4")]
    assert (n_of_m("2:4"), n_of_m("weight"), n_of_m("4:2")) == ((2, 4), None, None)
    for text in ("channel", "4:2", "0:4", "2:"):
        with pytest.raises(InputError, match="N:M such as 2:4"):
            check_granularity(text)
