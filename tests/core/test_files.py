"""Files are written completely or not at all; JSON from untrusted files is read or raises one error."""

import pytest

from tersor.core import files
from tersor.core.errors import InputError
from tersor.core.files import read_json, replacing, sha256, write_file


def test_json_values_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, -2.5, "\\u2028", null, true, -999999999999999999]}')
    assert read_json(tmp_path / "a.json", "") == {"a": [1, -2.5, "\u2028", None, True, -999_999_999_999_999_999]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "damaged"),
        (b"", "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "integer of 5000 digits"),
        (b"[-1000000000000000000]", r"it contains an integer of 19 digits \(at most 18 are possible\)"),
        (b" " * 101, "larger than"),
    ],
)
def test_unreadable_json_raises_one_error(tmp_path, monkeypatch, content, words):
    if words == "larger than":
        monkeypatch.setattr(files, "LARGEST", 100)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json.*{words}.*Do this\."):
        read_json(tmp_path / "a.json", "Do this.")


def test_reading_a_folder_as_json_raises(tmp_path):
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_json(tmp_path, "")


def test_a_failed_write_keeps_the_existing_file_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, b"before")

    def interrupted():
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_that_cannot_be_written_raises_one_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder: Is a directory"):
        write_file(tmp_path / "folder", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_sha256_of_a_file(tmp_path):
    write_file(tmp_path / "a", b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
