from __future__ import annotations

import difflib

import pytest

from tersor.core.errors import NonFiniteLoss, NonFiniteWeights, nearest, unknown


def test_swapped_letters_are_the_closest_match():
    assert difflib.get_close_matches("pqt", ["ptq", "qat"])[0] == "qat", "difflib alone prefers the other name"
    assert nearest("pqt", ["ptq", "qat"]) == "ptq"


def test_without_a_similar_name_there_is_no_hint():
    assert nearest("resnet", ["ptq", "qat"]) is None
    assert str(unknown("method", "resnet", ["qat", "ptq"])) == "unknown method 'resnet'. Possible: ptq, qat."


def test_a_nonfinite_loss_of_another_process_is_reported_without_its_name():
    later, first = (NonFiniteLoss(step, "", float("nan"), 0.1, None) for step in (4, 1))
    assert str(later).startswith("a loss in another process is nan at step 4, with a learning rate of 0.1.")
    assert str(first).startswith("a loss in another process is nan before any update of the weights.")
    assert str(NonFiniteLoss(4, "labels", float("nan"), 0.1, None)).startswith("the loss 'labels' is nan at step 4")


@pytest.mark.parametrize(("origin", "advice"), [("call", " Try a smaller learning_rate."), ("search", "")])
def test_without_a_recipe_at_most_a_smaller_learning_rate_is_suggested(origin, advice):
    message = str(NonFiniteLoss(4, "labels", float("nan"), 0.1, None, origin=origin))
    assert message.endswith(f"The weights were not updated in this step.{advice}")
    assert str(NonFiniteWeights("train", origin=origin)).endswith(f"infinite or NaN.{advice}")


def test_with_a_recipe_its_options_and_the_last_checkpoint_are_named():
    message = str(NonFiniteLoss(4, "labels", float("nan"), 0.1, "a/step-2"))
    advice = "Try a smaller optimizer.learning_rate, a larger lr_schedule.warmup_epochs, or clip_norm: 1."
    assert message.endswith(f"The weights were not updated in this step. Last good checkpoint: a/step-2. {advice}")


def test_for_a_python_file_the_error_asks_for_a_function_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = "a function that returns the network"
    message = lambda: str(unknown("model", "net.py", ["resnet20"], own))  # noqa: E731
    missing = f"there is no file 'net.py' in {tmp_path}. Correct the path, and write PATH:NAME; NAME is {own}."
    assert message() == missing
    absolute = str(unknown("model", str(tmp_path / "net.py"), ["resnet20"], own))
    assert absolute.startswith(f"there is no file '{tmp_path}/net.py'. Correct the path, and write PATH:NAME")
    file = tmp_path / "net.py"
    file.write_text("raise SystemExit\ndef make(): ...\ndef _hidden(): ...\n")
    assert message() == "'net.py' is a file. Write net.py:make. net.py defines make."
    file.write_text("class Net: ...\ndef make(): ...\n")
    assert message() == f"'net.py' is a file. Write net.py:NAME, where NAME is {own}. net.py defines Net, make."
    file.write_text("def (")
    assert message() == f"'net.py' is a file. Write net.py:NAME, where NAME is {own}."


def test_a_file_name_is_treated_as_an_unknown_name_where_no_function_is_possible():
    assert str(unknown("runtime", "ort.py", ["openvino"])) == "unknown runtime 'ort.py'. Possible: openvino."
