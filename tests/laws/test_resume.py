"""A run that is killed, or whose disk refuses, and that goes on in a fresh process ends with the same bits."""

import random
import sys
from collections import Counter

import killed
import pytest


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with the recipe, and what a run leaves that nothing stopped."""
    folder = tmp_path_factory.mktemp("killed")
    killed.prepare(folder, steps=16)
    return folder, killed.whole(folder)


def stopped(begun, phase, draw):
    """The phase that a kill hit which was meant for `phase`; bits are compared."""
    folder, expected = begun
    out = folder / "killed"
    killed.remove(out)
    hit = killed.kill(folder, out, phase, draw.uniform(0, expected.seconds[phase]))
    killed.require_same(folder, expected, out)
    return hit


def refused(begun, draw):
    folder, expected = begun
    out = folder / "refused"
    killed.remove(out)
    kind, after = killed.fault_of(expected, draw)
    killed.require_nothing_half_written(out, killed.start(folder, out, kind, after))
    killed.require_same(folder, expected, out)
    return kind


def test_killed_it_ends_with_the_same_bits(begun):
    stopped(begun, "training", random.Random(0))


def test_refused_by_the_disk_it_leaves_nothing_half_written(begun):
    refused(begun, random.Random(0))


@pytest.mark.slow
def test_killed_fifty_times_it_ends_with_the_same_bits(begun):
    draw = random.Random(1)
    hit = Counter(stopped(begun, killed.PHASES[number % len(killed.PHASES)], draw) for number in range(50))
    sys.stdout.write(f"{dict(hit)}\n")
    assert set(killed.PHASES) <= set(hit)


@pytest.mark.slow
def test_refused_twenty_times_it_leaves_nothing_half_written(begun):
    draw = random.Random(2)
    kinds = Counter(refused(begun, draw) for _ in range(20))
    assert len(kinds) == 3
