"""The files in the folder define the available methods."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

import tersor.methods
from tersor.core.errors import InputError
from tersor.graph.layer_selection import prunable
from tersor.methods import get, name_of, names
from tersor.methods.ptq import PTQ
from tersor.methods.soft_targets import SoftTargets

USERS = """
import {needs}
from pydantic.dataclasses import dataclass
from tersor.training.method import PLAIN_VALUES

@dataclass(frozen=True, config=PLAIN_VALUES)
class Mine:
    rate: float = 0.5
    def attach(self, model, **_): ...

class Other: ...
"""


def test_method_names_are_the_names_of_the_files():
    files = {path.stem for path in Path(tersor.methods.__file__).parent.glob("[!_]*.py")}
    assert set(names()) == files
    assert {"ptq", "soft_targets"} <= files


@pytest.mark.parametrize("name", names())
def test_every_file_contains_one_method(name: str):
    assert name_of(get(name)()) == name


def test_get_returns_the_class():
    assert get("ptq") is PTQ
    assert get("soft_targets") is SoftTargets


def test_module_docstrings_agree_with_the_code():
    """Each of these docstrings was wrong once."""
    cards = {name: " ".join((sys.modules[get(name).__module__].__doc__ or "").split()) for name in names()}
    assert get("brecq")().iterations == 2 * get("adaround")().iterations
    assert "2,000 per block at ten times the learning rate: as many in total as `adaround` runs" in cards["brecq"]
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    assert list(prunable(convolutions)) == ["0", "1"]
    masked = "fully connected layers are masked only if `layers` names them or there is no convolution"
    assert f"here it is masked too. As in the other methods, {masked}" in cards["rigl"]
    assert "without removing channels of the residual stream (`exclude` of `channel_pruning`)" in cards["fitnet"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("kd", "soft_targets"),
        ("knowledge-distillation", "soft_targets"),
        ("KD", "soft_targets"),
        ("SoftTargets", "soft_targets"),
        ("Soft-Targets", "soft_targets"),
        ("quantize", "ptq"),
        ("PTQ", "ptq"),
        ("ptk", "ptq"),
        ("pqt", "ptq"),
    ],
)
def test_common_names_of_a_method_suggest_the_registered_name(given: str, meant: str):
    with pytest.raises(InputError) as caught:
        get(given)
    assert f"unknown method '{given}'. Did you mean '{meant}'?" in str(caught.value)
    assert ", ".join(names()) in str(caught.value)


def test_a_method_that_does_not_exist_is_not_suggested(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tersor.methods, "names", lambda: ("soft_targets",))
    own = r"Name a method of your own as package\.module:Class\."
    with pytest.raises(InputError, match=rf"unknown method 'quantize'\. Possible: soft_targets\. {own}"):
        get("quantize")


def test_the_import_error_of_a_method_file_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_here")
    monkeypatch.setattr(tersor.methods, "__path__", [*tersor.methods.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_here"):
        get("broken")


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_own.py").write_text(USERS.format(needs="sys"))
    (tmp_path / "users_broken.py").write_text(USERS.format(needs="a_package_that_is_not_here"))
    yield
    sys.modules.pop("users_own", None)


@pytest.mark.usefixtures("users")
def test_a_users_class_can_be_used_as_a_method():
    cls = get("users_own:Mine")
    assert name_of(cls(rate=0.25)) == "users_own:Mine"
    assert get("users_own.py:Mine") is cls


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("users_own:Mien", "'Mien' is not a method. Did you mean 'Mine'? Possible: Mine."),
        ("users_own:Other", "'Other' is not a method. Possible: Mine."),
        ("users_own.x:Mine", "there is no module 'users_own.x'"),
        ("nowhere.at.all:Mine", "there is no module 'nowhere'"),
        (":Mine", "is not the name of a method. Write package.module:Class"),
        ("..users_own:Mine", "is not the name of a method. Write package.module:Class"),
        ("users_own:", "is not the name of a method. Write package.module:Class"),
    ],
)
def test_a_class_that_is_not_there(name: str, expected: str):
    with pytest.raises(InputError) as caught:
        get(name)
    assert expected in str(caught.value)


@pytest.mark.usefixtures("users")
def test_the_import_error_of_a_users_file_is_shown():
    with pytest.raises(InputError, match="a_package_that_is_not_here"):
        get("users_broken:Mine")


def test_a_dot_instead_of_the_colon_is_explained_in_the_error():
    with pytest.raises(InputError, match=r"unknown method 'slim\.Slim'\. Name .* as 'slim:Slim', with a colon"):
        get("slim.Slim")
