"""A run that is killed, or whose disk fails, ends with the same bits when it is resumed in a new process."""

import random
import sys
from collections import Counter

import killed
import pytest


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of the recipe, and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("killed")
    killed.prepare(folder, steps=16)
    return folder, killed.whole(folder)


def killed_and_resumed(uninterrupted, phase, draw):
    """Kill a run in `phase`, resume it and compare the bits; return the phase in which it was killed."""
    folder, expected = uninterrupted
    out = folder / "killed"
    killed.remove(out)
    hit = killed.kill(folder, out, phase, draw.uniform(0, expected.seconds[phase]))
    killed.require_same(folder, expected, out)
    return hit


def failed_and_resumed(uninterrupted, draw):
    folder, expected = uninterrupted
    out = folder / "failed"
    killed.remove(out)
    kind, after = killed.fault_of(expected, draw)
    killed.require_nothing_half_written(out, killed.start(folder, out, kind, after))
    killed.require_same(folder, expected, out)
    return kind


def test_a_killed_run_ends_with_the_same_bits(uninterrupted):
    killed_and_resumed(uninterrupted, "training", random.Random(0))


@pytest.mark.slow
def test_a_disk_fault_leaves_no_partial_files(uninterrupted):
    failed_and_resumed(uninterrupted, random.Random(0))


@pytest.mark.slow
def test_fifty_killed_runs_end_with_the_same_bits(uninterrupted):
    draw = random.Random(1)
    phases = (killed.PHASES[number % len(killed.PHASES)] for number in range(50))
    hit = Counter(killed_and_resumed(uninterrupted, phase, draw) for phase in phases)
    sys.stdout.write(f"{dict(hit)}\n")
    assert set(killed.PHASES) <= set(hit)


@pytest.mark.slow
def test_twenty_disk_faults_leave_no_partial_files(uninterrupted):
    draw = random.Random(2)
    kinds = Counter(failed_and_resumed(uninterrupted, draw) for _ in range(20))
    assert len(kinds) == 3
