"""Defaults of the training options."""

import pytest
from torch import nn

from tersor.training.optimizer import optimizer_for
from tersor.training.options import Training


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_trained_weights_get_a_tenth_of_the_learning_rate(name):
    training = Training(optimizer={"name": name})
    assert training.learning_rate(trained=True) == pytest.approx(training.learning_rate() / 10)


def test_a_given_learning_rate_is_used_for_all_weights():
    training = Training(optimizer={"learning_rate": 0.3})
    assert training.learning_rate() == training.learning_rate(trained=True) == 0.3


def test_the_optimizer_gets_the_resolved_learning_rate():
    training = Training().with_learning_rate(trained=True)
    assert optimizer_for(nn.Linear(2, 2), training).param_groups[0]["lr"] == training.learning_rate(trained=True)


def test_the_optimizer_gets_the_options_and_the_trainable_parameters():
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    options = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}
    (group,) = optimizer_for(network, Training(optimizer=options)).param_groups
    assert [each is network.weight for each in group["params"]] == [True]
    assert {name: group[name] for name in options} == options
    (group,) = optimizer_for(network, Training(optimizer=options | {"momentum": 0.0})).param_groups
    assert not group["nesterov"]
    (group,) = optimizer_for(network, Training(optimizer=options | {"nesterov": False})).param_groups
    assert not group["nesterov"]
    (group,) = optimizer_for(network, Training(optimizer={"name": "adamw", "weight_decay": 0.01})).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 0.01, (0.9, 0.999))
