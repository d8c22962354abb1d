"""The folder of a search whose start failed, or that was started by another search."""

import pytest

from search_fakes import baseline
from tersor.core.errors import InputError
from tersor.search.folder import BASELINES, LATENCIES, MODEL, STATE, SearchFolder


def started(path, model):
    """A search that was killed before its first measurement."""
    folder = SearchFolder(path, {"model": model})
    with folder.held():
        (path / BASELINES / "original.onnx").write_text(model)
        (path / MODEL).write_text(model)
        (path / LATENCIES).write_text("{}")
    return folder


def test_a_failed_start_leaves_no_files(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(InputError, match="no such model"), SearchFolder(tmp_path / name, {}).held():
            raise InputError("no such model")
    assert [each.name for each in tmp_path.rglob("*")] == ["empty"]
    with pytest.raises(InputError, match="no such model"), SearchFolder(tmp_path / "runs" / "mine", {}).held():
        raise InputError("no such model")
    assert [each.name for each in tmp_path.rglob("*")] == ["empty"], "nor the folders above it"


def test_an_interrupt_after_the_original_was_exported_keeps_the_folder(tmp_path):
    folder = SearchFolder(tmp_path / "out", {})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MODEL).write_text("original")
    with pytest.raises(KeyboardInterrupt), folder.held():
        raise KeyboardInterrupt
    assert (tmp_path / "out" / MODEL).is_file()
    assert (tmp_path / "out" / STATE).is_file()


def test_other_arguments_restart_a_search_without_measurements(tmp_path):
    study = started(tmp_path, "net:MyNett").state.study
    assert SearchFolder(tmp_path, {"model": "net:MyNett"}).state.study == study
    folder = SearchFolder(tmp_path, {"model": "net:MyNet"})
    assert folder.changed == ["with model 'net:MyNett', but 'net:MyNet' is given"]
    with folder.held():
        assert folder.state.study != study
        assert {each.name for each in tmp_path.rglob("*") if each.is_file()} == {"lock", STATE}
    assert SearchFolder(tmp_path, {"model": "net:MyNet"}).state == folder.state


def test_other_arguments_raise_after_the_baselines_are_measured(tmp_path):
    folder = started(tmp_path, "net:MyNet")
    folder.state.baselines = [baseline("original", 90.0, 2.0, "float32")]
    folder.save()
    with pytest.raises(InputError, match="belongs to a search with model 'net:MyNet', but 'net:Other' is given"):
        SearchFolder(tmp_path, {"model": "net:Other"})
    given = {"model": "net:Other", "students": "wide", "limit": "None"}
    message = r"but 'net:Other' is given; with students none, but 'wide' is given\. Use the same"
    with pytest.raises(InputError, match=message):
        SearchFolder(tmp_path, given)


def test_the_lock_file_of_a_killed_start_does_not_block_the_folder(tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "lock").touch()
    SearchFolder(tmp_path, {})
    (tmp_path / "trials" / "mine.txt").touch()
    with pytest.raises(InputError, match="already exists"):
        SearchFolder(tmp_path, {})
