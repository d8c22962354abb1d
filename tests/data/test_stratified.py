from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.data.stratified import generator, stratified


@st.composite
def cuts(draw):
    """Labels of up to 6 classes, and how many to draw."""
    labels = draw(st.lists(st.integers(0, 5), min_size=1, max_size=60))
    at_least, leave = draw(st.sampled_from([(0, 0), (1, 0), (0, 1)]))
    classes = len(set(labels))
    count = draw(st.integers(at_least * classes, len(labels) - leave * classes))
    return torch.tensor(labels), count, at_least, leave


@given(cut=cuts(), seed=st.integers(0, 99))
def test_a_split_is_complete_and_proportional(cut, seed):
    labels, count, at_least, leave = cut
    drawn, left = stratified(labels, count, generator(seed), at_least=at_least, leave=leave)
    assert len(drawn) == count
    assert sorted(drawn.tolist() + left.tolist()) == list(range(len(labels)))
    assert drawn.tolist() == sorted(drawn.tolist())
    for label in labels.unique():
        of_class, got = int((labels == label).sum()), int((labels[drawn] == label).sum())
        assert at_least <= got <= of_class - leave
        if not at_least and not leave:
            assert abs(got - count * of_class / len(labels)) < 1


def test_the_seed_determines_the_draw():
    labels = torch.arange(200) % 4
    first, second, third = (stratified(labels, 40, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_every_image_of_a_class_can_be_drawn():
    labels = torch.arange(20) % 2
    drawn = {place for seed in range(60) for place in stratified(labels, 4, generator(seed))[0].tolist()}
    assert drawn == set(range(20))


def test_the_global_generator_is_not_used():
    before = torch.get_rng_state()
    stratified(torch.arange(9) % 3, 3, generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_with_different_seeds_differ():
    draws = {tuple(torch.rand(3, generator=generator(*numbers)).tolist()) for numbers in [(0,), (1,), (0, 1), (1, 0)]}
    assert len(draws) == 4
