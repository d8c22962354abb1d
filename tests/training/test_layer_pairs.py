"""Which layers of student and teacher are paired, and the sizes of a pair."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.training.layer_pairs import LayerPair, match_layer, match_layers


def halving(depth, channels=2):
    """A network in which every layer halves height and width."""
    widths = [3, *(channels * (number + 1) for number in range(depth))]
    return nn.Sequential(*(nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)))


DATA = [torch.zeros(9, 3, 32, 16)]


def paths(pairs):
    return [pair.paths for pair in pairs]


def test_of_networks_of_different_depth_the_last_resolutions_are_paired():
    student, teacher = halving(2), halving(3, channels=5)
    pairs = match_layers(student, teacher, (), (), DATA, method="fitnet")
    assert paths(pairs) == [("0", "1"), ("1", "2")]
    first, last = pairs
    assert (first.student_shape, first.teacher_shape) == ((2, 2, 16, 8), (2, 10, 8, 4)), "of two images"
    assert (first.student_channels, first.teacher_channels) == (2, 10)
    assert (last.student_channels, last.teacher_channels) == (4, 15)
    assert first.common_size == first.teacher_size == (8, 4)
    assert paths(match_layers(teacher, student, (), (), DATA, method="fitnet")) == [("1", "0"), ("2", "1")]
    assert match_layers(teacher, student, (), (), DATA, method="fitnet")[0].common_size == (8, 4)


def test_a_single_pair_contains_the_last_or_the_named_layers():
    student, teacher = halving(2), halving(3)
    assert match_layer(student, teacher, "", "", DATA, method="crd").paths == ("1", "2")
    assert match_layer(student, teacher, "0", "", DATA, method="crd").paths == ("0", "0")
    assert match_layer(student, teacher, "0", "2", DATA, method="crd").paths == ("0", "2")
    with pytest.raises(InputError, match=r"takes one layer, and '\?' matches 2 of the student: 0, 1"):
        match_layer(student, teacher, "?", "", DATA, method="crd")
    with pytest.raises(InputError, match=r"takes one layer, and '\?' matches 3 of the teacher"):
        match_layer(student, teacher, "0", "?", DATA, method="crd")
    with pytest.raises(InputError, match="has teacher_layer but no layer"):
        match_layer(student, teacher, "", "0", DATA, method="crd")
    with pytest.raises(InputError, match="needs a teacher"):
        match_layer(student, None, "0", "", DATA, method="crd")
    with pytest.raises(InputError, match="needs images"):
        match_layers(student, teacher, (), (), [], method="crd")


def test_tokens_have_a_channel_count_and_a_square_size():
    maps, tokens = torch.Size((2, 8, 5, 3)), torch.Size((2, 17, 24))
    pair = LayerPair("a", "b", maps, tokens)
    assert (pair.student_channels, pair.teacher_channels) == (8, 24)
    assert (pair.teacher_size, pair.common_size) == ((4, 4), (4, 3))
    assert LayerPair("a", "b", tokens, maps).common_size == (4, 3)
