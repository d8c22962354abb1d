import errno
import re

import pytest
import torch

from tersor import checkpoint
from tersor.checkpoint import Checkpoints
from tersor.core.errors import InputError


def save(checkpoints, unit, step, *, done=False):
    tensors = {"a": torch.full((3,), float(step))}
    return checkpoints.save(unit, "train", step=step, done=done, tensors=tensors, structure={"cuts": []}, told={})


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "out.checkpoints")


def test_the_newest_is_found_again(checkpoints):
    save(checkpoints, 1, 4, done=True)
    for step in (2, 4, 6):
        save(checkpoints, 2, step)
    again = Checkpoints(checkpoints.folder)
    newest = again.newest_within(2)
    assert newest.step == 6
    assert newest.tensors()["a"].tolist() == [6, 6, 6]
    assert newest.structure() == {"cuts": []}
    assert again.end_of(1).step == 4
    assert again.end_of(2) is None
    assert [each.step for each in again.ends()] == [4]
    assert len(list(checkpoints.folder.glob("02-*"))) == 2, "of the unfinished ones, two stay"


@pytest.mark.parametrize("file", ["clock.json", "structure.json", "tensors.safetensors"])
def test_a_flipped_bit_costs_the_last_steps_only(checkpoints, file):
    save(checkpoints, 1, 2)
    path = save(checkpoints, 1, 4)
    content = bytearray((path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (path / file).write_bytes(content)
    assert checkpoints.newest_within(1).step == 2
    assert checkpoints.damaged == [path]


def test_a_full_disk_leaves_the_ones_before(checkpoints, monkeypatch):
    first = save(checkpoints, 1, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=f"No space left.*{re.escape(str(first))}.*--resume"):
        save(checkpoints, 1, 4)
    assert checkpoints.newest_within(1).path == first
    assert not checkpoints.scratch.exists()


def test_two_runs_into_one_folder_are_refused(checkpoints):
    other = Checkpoints(checkpoints.folder)
    with checkpoints.held("recipe", resume=False):
        save(checkpoints, 1, 2)
        with pytest.raises(InputError, match="another process"), other.held("recipe", resume=True):
            pass
    with other.held("recipe", resume=True):
        assert other.newest_within(1).step == 2


def test_what_has_not_ended_is_not_written_over(checkpoints):
    with checkpoints.held("a: 1\n", resume=False):
        save(checkpoints, 1, 2)
    with pytest.raises(InputError, match="--resume"), checkpoints.held("a: 1\n", resume=False):
        pass
    with pytest.raises(InputError, match="another recipe: a: 2"), checkpoints.held("a: 2\n", resume=True):
        pass
    assert checkpoints.newest_within(1).step == 2


def test_nothing_is_left_where_nothing_was_reached(checkpoints):
    with pytest.raises(ValueError, match="early"), checkpoints.held("a: 1\n", resume=True):
        raise ValueError("early")
    assert not checkpoints.folder.exists()


def test_a_run_that_was_killed_while_it_began_begins_anew(checkpoints):
    checkpoints.folder.mkdir()
    (checkpoints.folder / "recipe.yaml").write_text("a: ")
    with checkpoints.held("a: 1\n", resume=True):
        save(checkpoints, 1, 2)
    assert (checkpoints.folder / "recipe.yaml").read_text() == "a: 1\n"
