from __future__ import annotations

import difflib

from tersor.core.errors import nearest, unknown


def test_two_swapped_letters_come_before_other_similar_names():
    assert difflib.get_close_matches("pqt", ["ptq", "qat"])[0] == "qat", "difflib alone prefers the other name"
    assert nearest("pqt", ["ptq", "qat"]) == "ptq"


def test_without_a_similar_name_there_is_no_hint():
    assert nearest("resnet", ["ptq", "qat"]) is None
    assert str(unknown("method", "resnet", ["qat", "ptq"])) == "unknown method 'resnet'. Possible: ptq, qat."
    assert str(unknown("method", "clip.py", ["qat"])) == (
        "'clip.py' is a file, not a method. Write what to use from it too: clip.py:NAME."
    )
