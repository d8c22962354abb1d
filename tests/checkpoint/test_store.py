import errno
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from tersor.checkpoint import store
from tersor.checkpoint.store import Checkpoints, StageCheckpointer
from tersor.core.errors import InputError
from tersor.training.snapshot import restoring


def save(checkpoints, unit, step, *, done=False):
    tensors = {"a": torch.full((3,), float(step))}
    return checkpoints.save(unit, "train", step=step, done=done, tensors=tensors, structure={"cuts": []}, record={})


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "out.checkpoints")


def test_the_newest_checkpoint_is_found(checkpoints):
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


def test_checkpoints_of_a_renamed_stage_are_removed_and_later_stages_stay(checkpoints):
    for unit in (1, 2, 3):
        save(checkpoints, unit, 4, done=True)
    save(checkpoints, 2, 2)
    checkpoints.remove_renamed(["train", "quantize"])
    assert [each.unit for each in checkpoints.ends()] == [1, 3]
    assert checkpoints.newest_within(2) is None


@pytest.mark.parametrize("file", ["clock.json", "structure.json", "tensors.safetensors"])
def test_a_damaged_checkpoint_is_skipped_and_the_previous_one_is_used(checkpoints, file):
    save(checkpoints, 1, 2)
    path = save(checkpoints, 1, 4)
    content = bytearray((path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (path / file).write_bytes(content)
    assert checkpoints.newest_within(1).step == 2
    assert checkpoints.damaged == [path]


def test_a_full_disk_keeps_earlier_checkpoints(checkpoints, monkeypatch):
    first = save(checkpoints, 1, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(InputError, match=f"No space left.*{re.escape(str(first))}.*--resume"):
        save(checkpoints, 1, 4)
    assert checkpoints.newest_within(1).path == first
    assert not checkpoints.scratch.exists()


def test_a_second_process_cannot_use_the_same_folder(checkpoints):
    other = Checkpoints(checkpoints.folder)
    with checkpoints.held("recipe", resume=False):
        save(checkpoints, 1, 2)
        with pytest.raises(InputError, match="another process"), other.held("recipe", resume=True):
            pass
    with other.held("recipe", resume=True):
        assert other.newest_within(1).step == 2


def test_an_unfinished_run_is_not_overwritten_and_resumes_with_the_same_recipe_only(checkpoints):
    with checkpoints.held("a: 1\n", resume=False):
        save(checkpoints, 1, 2)
    with pytest.raises(InputError, match="--resume"), checkpoints.held("a: 1\n", resume=False):
        pass
    other = checkpoints.held("a: 2\n", resume=True, changes=lambda before: f"{before.strip()}, now 2")
    with (
        pytest.raises(
            InputError, match=r"another recipe \(a: 1, now 2\)\. Resume that run with its own recipe, .*recipe.yaml, or"
        ),
        other,
    ):
        pass
    assert checkpoints.newest_within(1).step == 2


def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_folder(checkpoints):
    with pytest.raises(ValueError, match="early"), checkpoints.held("a: 1\n", resume=True):
        raise ValueError("early")
    assert not checkpoints.folder.exists()


def test_a_run_killed_while_it_wrote_the_recipe_starts_again(checkpoints):
    checkpoints.folder.mkdir()
    (checkpoints.folder / "recipe.yaml").write_text("a: ")
    with checkpoints.held("a: 1\n", resume=True):
        save(checkpoints, 1, 2)
    assert (checkpoints.folder / "recipe.yaml").read_text() == "a: 1\n"


def rewritten(path, **changes):
    """A checkpoint as an attacker would write it: the contents are changed and the hashes are correct."""
    clock = json.loads((path / "clock.json").read_text()) | changes
    (path / "clock.json").write_text(json.dumps(clock))
    name = f"{path.name[:-8]}{hashlib.sha256((path / 'clock.json').read_bytes()).hexdigest()[:8]}"
    return path.rename(path.with_name(name))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "4"},
        {"step": 10**30},
        {"record": []},
        {"sha256": {}},
        {"sha256": {"../../secret": "0"}},
        {"sha256": []},
        {"more": 1},
    ],
)
def test_a_clock_with_invalid_values_is_skipped(checkpoints, changes):
    save(checkpoints, 1, 2)
    path = rewritten(save(checkpoints, 1, 4), **changes)
    assert checkpoints.newest_within(1).step == 2
    assert checkpoints.damaged == [path]


@pytest.mark.parametrize("clock", ["", "[]", "[" * 100_000, "9" * 5000, "null", "\x00"])
def test_a_clock_that_is_not_a_json_object_is_skipped(checkpoints, clock):
    path = save(checkpoints, 1, 4)
    (path / "clock.json").write_text(clock)
    rewritten_name = hashlib.sha256(clock.encode()).hexdigest()[:8]
    path = path.rename(path.with_name(path.name[:-8] + rewritten_name))
    assert checkpoints.newest_within(1) is None
    assert checkpoints.damaged == [path]


@pytest.mark.parametrize("record", [{}, {"stages": 1}, {"stages": [1]}, {"stages": {"a": {}}}])
def test_a_record_of_stages_with_a_wrong_shape_raises(checkpoints, record):
    checkpoints.save(1, "train", step=1, done=True, tensors={}, structure={}, record=record)
    with pytest.raises(InputError, match="does not belong to this run"), restoring("01"):
        _ = checkpoints.end_of(1).stages


def test_tensors_with_a_wrong_header_raise(checkpoints):
    path = save(checkpoints, 1, 4)
    content = (path / "tensors.safetensors").read_bytes().replace(b"[0,12]", b"[0,99]")
    (path / "tensors.safetensors").write_bytes(content)
    digests = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in ("structure.json",)}
    rewritten(path, sha256=digests | {"tensors.safetensors": hashlib.sha256(content).hexdigest()})
    with pytest.raises(InputError, match=r"tensors\.safetensors is damaged"):
        checkpoints.newest_within(1).tensors()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("where", ["mkdir", "write_text"])
def test_a_folder_that_cannot_be_written_raises_and_nothing_is_left(tmp_path, monkeypatch, number, where):
    def refused(path, *_given, **_options):
        raise OSError(number, "refused", str(path))

    checkpoints = Checkpoints(tmp_path / "runs" / "out.checkpoints")
    monkeypatch.setattr(Path, where, refused)
    words = r"cannot use .*out\.checkpoints: .*refused"
    with pytest.raises(InputError, match=words), checkpoints.held("recipe", resume=False):
        raise AssertionError
    monkeypatch.undo()
    assert not checkpoints.folder.exists()


def test_without_file_locks_the_created_folders_are_removed(tmp_path, monkeypatch):
    def refused(*_given, **_options):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(store.FileLock, "acquire", refused)
    (tmp_path / "runs").mkdir()
    checkpoints = Checkpoints(tmp_path / "runs" / "deep" / "out.checkpoints")
    with pytest.raises(InputError, match="no locks here"), checkpoints.held("recipe", resume=False):
        raise AssertionError
    assert not list((tmp_path / "runs").iterdir())


def test_a_stage_resumes_from_its_setup_or_from_its_training(checkpoints):
    network = torch.nn.Linear(1, 1)
    keeper = StageCheckpointer(checkpoints, 2, "a", 5, {"cuts": [1]})
    assert (keeper.resume_state, keeper.setup_state, keeper.every, keeper.last) == (None, None, 5, None)
    keeper.keep_setup(network)
    again = StageCheckpointer(checkpoints, 2, "a", 5, {})
    assert again.resume_state is None
    assert again.setup_state.keys() == {"weight", "bias"}
    again.notes = ("one", "two")
    again.save(7, {"model.weight": torch.ones(2)})
    assert again.last == str(checkpoints.newest_within(2).path)
    third = StageCheckpointer(checkpoints, 2, "a", 5, {})
    assert third.setup_state is None
    assert third.resume_state[0] == 7
    assert third.resume_state[1]["model.weight"].tolist() == [1, 1]
    assert third.notes == ("one", "two")
    assert StageCheckpointer(checkpoints, 1, "a", 5, {}).resume_state is None
    assert checkpoints.newest_within(2).structure() == {}


def test_a_checkpoint_of_the_same_step_replaces_the_earlier_one(checkpoints):
    save(checkpoints, 1, 2)
    tensors = {"a": torch.zeros(3)}
    second = checkpoints.save(1, "train", step=2, done=False, tensors=tensors, structure={}, record={})
    assert [each.name for each in checkpoints.folder.glob("01-*")] == [second.name]
    assert checkpoints.last == str(second)
