"""How many blocks go for a budget."""

import pytest

from tersor.pruning.budget import meet_cost, meet_latency


def test_the_network_is_measured_if_the_predicted_cost_is_wrong():
    counted = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert meet_cost(counted, lambda blocks: counted[blocks], 0.6) == (2, 0.6)
    assert meet_cost(counted, lambda blocks: counted[blocks] + 0.1 * blocks, 0.6) == (4, pytest.approx(0.6))
    assert meet_cost(counted, lambda blocks: counted[blocks] + 0.5, 0.6) == (4, pytest.approx(0.7)), "as near as may be"


def test_a_latency_is_met_with_nearly_the_fewest_blocks():
    stays = [1 - block / 100 for block in range(101)]
    blocks, found = meet_latency(stays, lambda blocks: 0.2 + 0.8 * stays[blocks], 0.5)
    assert 0.48 < found <= 0.5
    assert found == pytest.approx(0.2 + 0.8 * stays[blocks])
    assert meet_latency(stays, lambda _blocks: 0.9, 0.5) == (100, 0.9)
