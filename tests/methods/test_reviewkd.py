"""reviewkd's fused computation compared with the computation in the order of the paper."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from tersor.data.batch import Batch
from tersor.methods.reviewkd import Fusion, ReviewTerm
from tersor.training.layer_pairs import LayerPair
from tersor.training.objective import Outputs

BATCH = Batch(torch.zeros(1, 3, 1, 1))


def fused_slowly(fusion, features, later, size):
    """1x1 convolution and BatchNorm, attention over both, sum, 3x3 convolution and BatchNorm."""
    own = fusion.inward(features)
    if fusion.attention is not None:
        later = F.interpolate(later, own.shape[2:], mode="nearest")
        shares = fusion.attention(torch.cat([own, later], 1)).sigmoid()
        own = own * shares[:, :1] + later * shares[:, 1:]
    own = F.interpolate(own, size, mode="nearest")
    return fusion.outward(own), own


def hierarchical_slowly(ours, theirs):
    """The authors' HCL: every level is pooled from the whole map."""
    loss, weights, weight = F.mse_loss(ours, theirs), 1.0, 1.0
    for level in (4, 2, 1):
        if level < ours.shape[2]:
            weight /= 2
            weights += weight
            loss = loss + weight * F.mse_loss(*(F.adaptive_avg_pool2d(each, level) for each in (ours, theirs)))
    return loss / weights


def loss_slowly(term, student, teacher):
    names = [pair.student for pair in reversed(term.pairs)]
    ours = [student[names[0]].mean((2, 3), keepdim=True), *(student[name] for name in names)]
    theirs = [teacher[names[0]].mean((2, 3), keepdim=True), *(teacher[name] for name in names)]
    later, total = None, 0.0
    for fusion, features, wanted in zip(term.fusions, ours, theirs, strict=True):
        reviewed, later = fused_slowly(fusion, features, later, wanted.shape[2:])
        total = total + hierarchical_slowly(reviewed, wanted)
    return total


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([(4, 8), (6, 4), (8, 2)], [(5, 8), (7, 4), (9, 2)]),
        ([(4, 14), (6, 7), (8, 3)], [(5, 14), (7, 5), (9, 4)]),
        ([(4, 7), (8, 7)], [(4, 9), (8, 3)]),
    ],
)
def test_loss_and_gradients_equal_those_of_the_paper(ours, theirs, training):
    torch.manual_seed(0)
    shapes = [[(3, channels, side, side) for channels, side in each] for each in (ours, theirs)]
    names = [f"layer{place}" for place in range(len(ours))]
    pairs = [LayerPair(name, name, *map(torch.Size, two)) for name, *two in zip(names, *shapes, strict=True)]
    term = ReviewTerm(pairs, 1.0).train(training)
    for name, value in term.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 2)
    slow = copy.deepcopy(term)
    teacher = {name: torch.randn(shape) for name, shape in zip(names, shapes[1], strict=True)}
    given = {name: torch.randn(shape, requires_grad=True) for name, shape in zip(names, shapes[0], strict=True)}
    again = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    loss = term(BATCH, Outputs(torch.zeros(()), given), Outputs(torch.zeros(()), teacher))
    expected = loss_slowly(slow, again, teacher)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name in names:
        torch.testing.assert_close(given[name].grad, again[name].grad, rtol=1e-3, atol=1e-6)
    for (name, ours_now), theirs_now in zip(term.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours_now.grad, theirs_now.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (name, ours_now), theirs_now in zip(term.named_buffers(), slow.buffers(), strict=True):
        if "tracked" not in name:
            torch.testing.assert_close(ours_now, theirs_now, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("channels", "width"), [(8, 8), (513, 512)])
def test_fused_features_have_the_channels_of_the_last_layer_but_at_most_512(channels, width):
    shapes = torch.Size((2, channels, 4, 4)), torch.Size((2, 5, 4, 4))
    (pooled, fusion) = ReviewTerm([LayerPair("layer", "layer", *shapes)], 1.0).fusions
    assert pooled.inward(torch.zeros(2, channels, 1, 1)).shape == (2, width, 1, 1)
    assert fusion.inward(torch.zeros(2, channels, 4, 4)).shape == (2, width, 4, 4)


def test_statistics_are_accurate_for_features_with_a_large_mean():
    torch.manual_seed(0)
    fusion = Fusion(4, 8, 5, 0, 1).train()
    slow = copy.deepcopy(fusion)
    features = 100 + torch.randn(3, 4, 6, 6)
    ours, theirs = fusion(features, None, (6, 6))[1], slow.inward(features)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
