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


def test_the_optimizer_gets_the_learning_rate_that_was_written_out():
    training = Training().with_learning_rate(trained=True)
    assert optimizer_for(nn.Linear(2, 2), training).param_groups[0]["lr"] == training.learning_rate(trained=True)
