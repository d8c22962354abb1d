from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from tersor.checkpoint.artifact import read_artifact, read_folder, replace_file, require_free, write_folder
from tersor.core.errors import InputError

CONTENTS = {"model.onnx": b"network", "original.onnx": b"large network", "checkpoints/last.bin": b"\x00\x01"}


def fill(folder: Path) -> None:
    for name, contents in CONTENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(contents)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "out", fill)


def test_a_written_folder_is_read_back_unchanged(out):
    artifact = read_artifact(out)
    assert artifact.model == out / "model.onnx"
    assert {name: file.read_bytes() for name, file in artifact.files.items()} == CONTENTS
    assert names(out.parent) == ["out"], "no temporary folder stays"


def test_the_manifest_contains_size_and_hash_of_every_file(out):
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tersor"]
    assert manifest["files"] == {
        name: {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
        for name, contents in CONTENTS.items()
    }


def test_the_folder_has_the_usual_permissions(out):
    ordinary = out.with_name("ordinary")
    ordinary.mkdir()
    assert out.stat().st_mode == ordinary.stat().st_mode


def test_the_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "out"

    def watched(folder: Path) -> None:
        assert folder.parent == out.parent, "a rename stays on one file system"
        fill(folder)
        assert not out.exists()

    write_folder(out, watched)
    assert out.is_dir()


def test_missing_parent_folders_are_created(tmp_path):
    out = write_folder(tmp_path / "runs" / "today" / "out", fill)
    assert read_artifact(out).model.read_bytes() == b"network"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_no_files(tmp_path, failure):
    def fails(folder: Path) -> None:
        fill(folder)
        raise failure

    with pytest.raises(failure):
        write_folder(tmp_path / "runs" / "out", fails)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_other_files_in_the_parent_folder(tmp_path):
    def fails(folder: Path) -> None:
        (folder.parent / "mine.txt").write_text("mine")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "runs" / "out", fails)
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("taken", ["folder", "file", "broken link"])
def test_an_existing_path_is_not_overwritten(tmp_path, taken):
    out = tmp_path / "out"
    if taken == "folder":
        out.mkdir()
    elif taken == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = names(tmp_path)

    def never(_: Path) -> None:
        raise AssertionError

    with pytest.raises(InputError, match="already exists"):
        write_folder(out, never)
    assert names(tmp_path) == before


def test_a_folder_created_during_the_write_is_not_overwritten(tmp_path):
    out = tmp_path / "out"

    def slow(folder: Path) -> None:
        fill(folder)
        out.mkdir()

    with pytest.raises(InputError, match="already exists"):
        write_folder(out, slow)
    assert names(tmp_path) == ["out"]
    assert not list(out.iterdir())


def test_a_path_below_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        require_free(tmp_path / "file" / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_path_without_write_permission_raises(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="may not be written"):
            require_free(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_flipped_bit_in_a_file_is_detected(out, name):
    contents = bytearray((out / name).read_bytes())
    contents[-1] ^= 1
    (out / name).write_bytes(contents)
    with pytest.raises(InputError, match=f"is damaged: {name} was changed"):
        read_artifact(out)


def test_every_damaged_file_is_listed_in_the_error(out):
    (out / "model.onnx").write_bytes(b"net")
    (out / "original.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.onnx has 3 bytes instead of 7, original\.onnx is missing"):
        read_artifact(out)


def test_an_added_file_is_ignored(out):
    (out / "notes.txt").write_text("served since May")
    assert "notes.txt" not in read_artifact(out).files


@pytest.mark.parametrize("text", ["", "[]", "{", '{"tersor": "1", "files": {}}', '{"tersor": "1", "files": {"a": 1}}'])
def test_a_damaged_manifest_raises(out, text):
    (out / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_artifact(out)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_cannot_refer_to_files_outside_its_folder(out, name):
    manifest = {"tersor": "1", "files": {name: {"bytes": 1, "sha256": "0"}}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="outside the folder"):
        read_artifact(out)


def test_a_folder_without_a_model_raises(tmp_path):
    out = write_folder(tmp_path / "out", lambda folder: (folder / "a.txt").write_text("a") and None)
    with pytest.raises(InputError, match=r"holds no model\.onnx, only a\.txt\. Pass the folder of a run"):
        read_artifact(out)


def test_a_single_onnx_file_is_read_as_an_artifact(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"network")
    artifact = read_artifact(path)
    assert artifact.model == path
    assert artifact.files == {"net.onnx": path}


def test_a_path_that_is_not_an_artifact_raises(tmp_path):
    with pytest.raises(InputError, match="not found"):
        read_artifact(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        read_artifact(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="is not a model"):
        read_artifact(tmp_path / "weights.safetensors")


def write_report(text: str):
    return lambda folder: (folder / "report.html").write_text(text)


def test_a_replaced_file_is_in_the_manifest(out):
    replace_file(out, "report.html", write_report("first"))
    assert "report.html" in read_artifact(out).files
    replace_file(out, "report.html", write_report("second"))
    assert read_artifact(out).files["report.html"].read_text() == "second"
    assert {name: (out / name).read_bytes() for name in CONTENTS} == CONTENTS
    assert names(out) == ["checkpoints", "manifest.json", "model.onnx", "original.onnx", "report.html"]


def test_a_damaged_file_can_be_replaced_but_not_while_another_file_is_damaged(out):
    replace_file(out, "report.html", write_report("first"))
    (out / "report.html").write_text("broken")
    replace_file(out, "report.html", write_report("second"))
    read_artifact(out)
    (out / "original.onnx").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"original\.onnx has 6 bytes"):
        replace_file(out, "report.html", write_report("third"))
    assert (out / "report.html").read_text() == "second"


def test_a_failed_replacement_keeps_the_manifest(out):
    before = (out / "manifest.json").read_bytes()

    def fails(_: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_file(out, "report.html", fails)
    assert (out / "manifest.json").read_bytes() == before


def test_a_file_can_be_replaced_in_an_artifact_folder_only(tmp_path):
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        replace_file(tmp_path, "report.html", write_report("text"))
    with pytest.raises(InputError, match=r"does not exist\. Pass a folder that a run or tersor\.save wrote"):
        replace_file(tmp_path / "absent", "report.html", write_report("text"))


def manifest_naming(out, name, **entry):
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()} | entry
    (out / "manifest.json").write_text(json.dumps({"tersor": "1", "files": {name: entry}}))


def test_a_symbolic_link_to_a_file_outside_the_folder_raises(out, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (out / "link").symlink_to(tmp_path / "secret")
    (out / "linked").symlink_to(tmp_path)
    for name in ("link", "linked/secret"):
        manifest_naming(out, name)
        with pytest.raises(InputError, match="outside the folder"):
            read_artifact(out)


@pytest.mark.parametrize("name", ["", ".", "a\x00b", "a\nb", "a" * 5000, "..\\secret", "\ud800"])
def test_an_invalid_file_name_in_the_manifest_raises(out, name):
    manifest_naming(out, name)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_artifact(out)


@pytest.mark.parametrize("entry", [{"bytes": -1}, {"bytes": "6"}, {"bytes": 10**30}, {"bytes": 6.5}, {"sha256": 1}])
def test_a_manifest_entry_of_the_wrong_type_raises(out, entry):
    manifest_naming(out, "model.onnx", **entry)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_artifact(out)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, " " * 2**22 + "{}", "\ud800".encode(errors="surrogatepass")]
)
def test_a_manifest_that_is_not_valid_json_raises(out, text):
    (out / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_artifact(out)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_raises_one_error_and_leaves_no_files(tmp_path, number):
    def fails(folder: Path) -> None:
        fill(folder)
        raise OSError(number, os.strerror(number), str(folder / "model.onnx"))

    with pytest.raises(InputError, match=rf"out could not be written: .*{os.strerror(number)}.*--resume"):
        write_folder(tmp_path / "runs" / "out", fails)
    assert not list(tmp_path.iterdir())


def test_an_oserror_for_another_file_propagates(tmp_path):
    def fails(_: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "their_weights.bin")

    with pytest.raises(FileNotFoundError):
        write_folder(tmp_path / "out", fails)


def test_a_manifest_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path, monkeypatch):
    out = write_folder(tmp_path / "out", lambda folder: (folder / "report.html").write_text("first"))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name == "manifest.json"}

    def refuse(_path, _target):
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises((OSError, InputError)):
            replace_file(out, "report.html", write_report("second"))
    assert {path.name for path in out.iterdir()} == {"manifest.json", "report.html"}
    assert (out / "manifest.json").read_bytes() == before["manifest.json"]


def test_without_a_manifest_only_a_complete_folder_of_a_search_is_read(tmp_path):
    for names in (("front.json",), ("model.onnx",)):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
        with pytest.raises(InputError, match=r"was not written by a run or tersor\.save"):
            read_artifact(folder)
    (folder / "front.json").write_text("")
    assert read_artifact(folder).model == folder / "model.onnx"
    assert list(read_artifact(folder).files) == ["model.onnx", "numbers.json"]
    with pytest.raises(InputError, match=r"belongs to a search, but the folder of a run is needed"):
        read_folder(folder)


def test_for_a_parent_folder_the_error_lists_the_runs_in_it(tmp_path):
    for name in ("b", "a", "more/c"):
        write_folder(tmp_path / "runs" / name, lambda folder: (folder / "model.onnx").write_text("x"))
    (tmp_path / "runs" / "search").mkdir()
    (tmp_path / "runs" / "search" / "front.json").write_text("{}")
    runs = tmp_path / "runs"
    with pytest.raises(InputError) as caught:
        read_artifact(runs)
    assert str(caught.value) == (
        f"{runs} was not written by a run or tersor.save: it has no manifest.json. It contains the runs {runs}/a, "
        f"{runs}/b, {runs}/more/c and the searches {runs}/search. Pass one of them, such as {runs}/a."
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no manifest\.json\. Pass a folder that a run or tersor\.save wrote\.$"):
        read_folder(tmp_path / "empty")
    with pytest.raises(InputError, match=r"Pass the folder of a run or a search, or a \.onnx or \.xml file\.$"):
        read_artifact(tmp_path / "empty")


@pytest.mark.parametrize(
    ("file", "again"), [("recipe.yaml", "run its recipe.yaml again"), ("model.py", "write it again with tersor.save")]
)
def test_a_damaged_folder_is_written_again_as_it_was_made(file, again, tmp_path):
    out = write_folder(tmp_path / "out", lambda folder: (folder / file).write_text("x"))
    (out / file).write_text("y")
    with pytest.raises(InputError, match=rf"{file} was changed\. Copy it again, or {again}\.$"):
        read_folder(out)


def test_the_list_of_runs_in_the_error_is_truncated(tmp_path):
    for number in range(12):
        write_folder(tmp_path / f"{number:02}", lambda folder: (folder / "model.onnx").write_text("x"))
    with pytest.raises(InputError, match=r"/09, \.\.\.\. Pass one of them, such as .*/00\."):
        read_artifact(tmp_path)
