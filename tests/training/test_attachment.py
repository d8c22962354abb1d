from __future__ import annotations

import torch
from torch import nn

from tersor.training.attachment import Attachment, Chain
from tersor.training.objective import LossTerm


class Recorder(Attachment):
    """Writes down what it was told, with the weight at that moment."""

    def __init__(self, model, said, name, label_weight=1.0):
        super().__init__(model, [LossTerm()], label_weight)
        self.said = said
        self.name = name

    def begin(self):
        self.said.append((self.name, "begin"))

    def before_step(self, step, optimizer):
        self.said.append((self.name, "before", step, self.model.weight.item()))

    def after_step(self, step, optimizer):
        self.said.append((self.name, "after", step, self.model.weight.item()))

    def finish(self):
        self.said.append((self.name, "finish"))


def setting():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def step(model, optimizer):
    optimizer.zero_grad()
    model.weight.sum().backward()  # gradient 1: every step takes 1 off
    optimizer.step()


def test_hooks_are_called_around_the_step():
    model, optimizer = setting()
    said = []
    Recorder(model, said, "a").bind(optimizer, start=7)
    step(model, optimizer)
    step(model, optimizer)
    assert said == [("a", "before", 7, 5), ("a", "after", 7, 4), ("a", "before", 8, 4), ("a", "after", 8, 3)]


def test_remove_leaves_no_hook():
    model, optimizer = setting()
    said = []
    handle = Recorder(model, said, "a").bind(optimizer)
    other = Recorder(model, said, "b").bind(optimizer)
    handle.remove()
    handle.remove()
    step(model, optimizer)
    assert [word[0] for word in said] == ["b", "b"]
    other.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_chain_keeps_the_order_and_multiplies_label_weights():
    model, optimizer = setting()
    said = []
    parts = [Recorder(model, said, "a", 0.5), Recorder(model, said, "b", 0.25)]
    chain = Chain(model, parts)
    assert chain.label_weight == 0.125
    assert chain.terms == (*parts[0].terms, *parts[1].terms)
    chain.begin()
    assert said == [("a", "begin"), ("b", "begin")]
    said.clear()
    chain.bind(optimizer)
    step(model, optimizer)
    chain.finish()
    assert [word[:2] for word in said] == [
        ("a", "before"),
        ("b", "before"),
        ("a", "after"),
        ("b", "after"),
        ("a", "finish"),
        ("b", "finish"),
    ]


def test_an_empty_chain_asks_nothing():
    model, _ = setting()
    chain = Chain(model, [])
    assert (chain.terms, chain.label_weight) == ((), 1.0)
