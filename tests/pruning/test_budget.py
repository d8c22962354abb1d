"""The number of blocks removed for a budget."""

from itertools import accumulate

import pytest

from tersor.pruning.budget import meet_cost, meet_latency
from tersor.pruning.channel_selection import RemovalOrder


def order_of(*blocks):
    """A removal order of these blocks; the groups are not needed."""
    return RemovalOrder([], [], list(blocks))


def remaining(costs):
    """The fraction that remains after each block of an order, if a block of group N costs `costs[N]`."""
    return lambda order: [1.0, *(1 - total for total in accumulate(costs[number] for number, _ in order.blocks))]


def test_the_network_is_measured_if_the_predicted_cost_is_wrong():
    order, counted = order_of((0, 1), (0, 2), (0, 3), (0, 4)), [1.0, 0.8, 0.6, 0.4, 0.2]

    def met(wrong):
        same, *found = meet_cost(order, lambda _: counted, lambda _, blocks: counted[blocks] + wrong(blocks), 0.6)
        assert same is order
        return found

    assert met(lambda _: 0.0) == [2, 0.6]
    assert met(lambda blocks: 0.1 * blocks) == [4, pytest.approx(0.6)]
    assert met(lambda _: 0.5) == [4, pytest.approx(0.7)], "as near as may be"
    assert met(lambda _: 0.002) == [3, pytest.approx(0.402)], "a small error counts if the target is missed"
    assert met(lambda _: -0.002) == [2, pytest.approx(0.598)]


def test_a_block_much_larger_than_the_remaining_target_is_postponed():
    order = order_of((0, 1), (1, 1), (0, 2), (1, 2), (2, 1), (0, 3))
    found, blocks, fraction = meet_cost(order, remaining([0.1, 0.6, 0.31]), None, 0.5)
    assert found.blocks == [(0, 1), (0, 2), (2, 1), (0, 3), (1, 1), (1, 2)]
    assert (blocks, fraction) == (3, pytest.approx(0.49))


def test_a_block_is_not_postponed_if_that_comes_no_closer_to_the_target():
    order = order_of((0, 1), (1, 1), (0, 2))
    assert meet_cost(order, remaining([0.1, 0.6]), None, 0.5) == (order, 2, pytest.approx(0.3))
    near = order_of((0, 1), (1, 1), (2, 1))
    assert meet_cost(near, remaining([0.1, 0.415, 0.4]), None, 0.5) == (near, 2, pytest.approx(0.485)), "near enough"


def test_a_latency_target_is_met_with_nearly_the_fewest_blocks():
    stays = [1 - block / 100 for block in range(101)]
    blocks, found = meet_latency(stays, lambda blocks: 0.2 + 0.8 * stays[blocks], 0.5)
    assert 0.48 < found <= 0.5
    assert found == pytest.approx(0.2 + 0.8 * stays[blocks])
    assert meet_latency(stays, lambda _blocks: 0.9, 0.5) == (100, 0.9)


@pytest.mark.parametrize("needed", [1, 37, 64, 99, 100])
def test_a_latency_target_reached_at_one_block_is_met_with_exactly_that_many_blocks(needed):
    measured = []

    def ratio(blocks):
        measured.append(blocks)
        return 0.4 if blocks >= needed else 0.9

    stays = [1 - block / 100 for block in range(101)]
    assert meet_latency(stays, ratio, 0.5) == (needed, 0.4)
    assert len(measured) == len(set(measured)) <= 8
    assert 0 not in measured


def test_latency_is_bisected_by_the_remaining_macs_and_not_by_blocks():
    measured = []

    def ratio(blocks):
        measured.append(blocks)
        return stays[blocks]

    stays = [1.0, 0.55, 0.49, *[0.1 - block / 1000 for block in range(50)]]
    assert meet_latency(stays, ratio, 0.5) == (2, 0.49)
    assert measured == [2]
