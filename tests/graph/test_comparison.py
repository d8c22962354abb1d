from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError
from tersor.graph.comparison import FEW, difference, few_images, outputs_of, require_same, undone_unless_same
from tersor.methods.ptq import PTQ
from tersor.training.context import AttachContext

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        maps = self.conv(images)
        return {"maps": maps, "parts": (maps.mean((2, 3)), None, maps.argmax(1))}


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
    ).eval()


def test_outputs_of_any_structure_are_returned_in_eval_mode():
    model = nn.Sequential(Several()).train()
    assert [tuple(each.shape) for each in outputs_of(model, IMAGES)] == [(8, 4, 4, 4), (8, 4)]
    assert model.training


def test_random_numbers_are_repeatable_and_the_global_generator_is_not_changed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    model.register_forward_hook(lambda _, __, given: given + torch.rand_like(given))
    state = torch.get_rng_state()
    assert difference(outputs_of(model, IMAGES), outputs_of(model, IMAGES)) == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([4.0, -2.0], 0.0),
        ([4.0, -1.0], 0.25),
        ([4.0, float("nan")], float("inf")),
        ([4.0], float("inf")),
    ],
)
def test_difference_matches_values_computed_by_hand(after, expected):
    assert difference([torch.tensor(after)], [torch.tensor([4.0, -2.0])]) == expected


def test_equal_nans_are_no_difference_and_zero_outputs_are_compared():
    nan = torch.tensor([1.0, float("nan"), float("inf")])
    assert difference([nan], [nan.clone()]) == 0
    assert difference([torch.ones(2)], [torch.zeros(2)]) > 1
    assert difference([], [torch.zeros(2)]) == float("inf")


def test_a_rewrite_that_changes_the_outputs_is_undone_with_a_note():
    model = chain()
    before = copy.deepcopy(model.state_dict())
    note = undone_unless_same(model, IMAGES, lambda: model[0].weight.mul_(1.1), "the rewrite")
    assert note is not None
    assert note.startswith("the rewrite was undone: it changed the outputs by")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert undone_unless_same(model, IMAGES, lambda: model[0].weight.mul_(1 + 1e-6), "the rewrite") is None
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_an_iterator_is_read_once():
    few, rest = few_images(iter([IMAGES, IMAGES + 1]), torch.device("cpu"))
    assert torch.equal(few, IMAGES[:FEW])
    assert [each.mean() for each in rest] == [each.mean() for each in (IMAGES, IMAGES + 1)]
    batches = [IMAGES]
    assert few_images(batches, torch.device("cpu"))[1] is batches
    with pytest.raises(InputError, match="contains no images"):
        few_images([], torch.device("cpu"))


def test_require_same_raises_for_different_outputs():
    model, other = chain(), chain()
    expected = outputs_of(model, IMAGES)
    require_same(other, expected, IMAGES)
    other[3].bias.data[0] += 1
    with pytest.raises(InputError, match="Sequential is not equivalent to Sequential: at batch size 8"):
        require_same(other, expected, IMAGES)


class Asks(nn.Module):
    """Has a Python branch of which a graph contains only one side."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, images):
        maps = torch.relu(self.conv(images))
        return self.head((maps if torch.is_grad_enabled() else maps + 1).mean((2, 3)))


@pytest.mark.parametrize("verb", ["quantize", "prune"])
def test_a_graph_that_is_not_equivalent_to_the_network_raises(verb):
    torch.manual_seed(0)
    model = Asks().eval()
    call = {
        "quantize": lambda: tersor.quantize(model, [IMAGES]),
        "prune": lambda: tersor.prune(model, [IMAGES], round_to=1),
    }
    with pytest.raises(InputError, match="the captured graph of Asks is not equivalent to"):
        call[verb]()


def test_inexact_equalization_is_undone_with_a_note(monkeypatch):
    model = chain()
    state = copy.deepcopy(model.state_dict())

    def wrong(graph):
        graph.get_submodule("1").weight.div_(2)
        return 1

    monkeypatch.setattr("tersor.methods.ptq.equalize", wrong)
    attached = PTQ(equalize=True).attach(model, AttachContext(data=iter([IMAGES])))
    attached.begin()
    assert any(note.startswith("cross-layer equalization was undone") for note in attached.notes)
    assert torch.equal(attached.model.get_submodule("1").weight, state["1.weight"])


def test_exact_equalization_is_kept():
    model = chain()
    before = model[1].weight.detach().clone()
    attached = PTQ(equalize=True).attach(model, AttachContext(data=iter([IMAGES])))
    attached.begin()
    assert not any("undone" in note for note in attached.notes)
    assert not torch.equal(model[1].weight, before)
