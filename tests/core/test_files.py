"""JSON of a stranger is read or refused with one message."""

import pytest

from tersor.core import files
from tersor.core.errors import InputError
from tersor.core.files import read_json


def test_values_come_back(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, -2.5, "\\u2028", null, true, 999999999999999999]}')
    assert read_json(tmp_path / "a.json", "") == {"a": [1, -2.5, "\u2028", None, True, 999_999_999_999_999_999]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "damaged"),
        (b"", "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "integer of 5000 digits"),
        (b"[-1000000000000000000]", "integer of 20 digits"),
        (b" " * 101, "larger than"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, monkeypatch, content, words):
    if words == "larger than":
        monkeypatch.setattr(files, "LARGEST", 100)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json.*{words}.*Do this\."):
        read_json(tmp_path / "a.json", "Do this.")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_json(tmp_path, "")
