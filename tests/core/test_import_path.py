from __future__ import annotations

import sys

import pytest

from tersor.core.errors import InputError
from tersor.core.import_path import call_with, import_function, is_function_path, named


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_a_function_in_the_current_folder_is_imported(here):
    (here / "our_nets_a.py").write_text("def build(num_classes):\n    return num_classes + 1\n")
    assert is_function_path("our_nets_a:build")
    assert import_function("our_nets_a:build")(4) == 5


def test_for_a_file_that_python_cannot_import_the_error_suggests_renaming_it(here):
    (here / "my-net.py").write_text("def make(): ...\n")
    with pytest.raises(InputError, match=r"'my-net\.py:make': Python cannot import my-net\.py\. Rename the file"):
        import_function("my-net.py:make")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("net.py:my-func", "'my-func' cannot be the name of a Python function. Write one that net.py defines."),
        ("net.py:", "'net.py' is a file. Write net.py:make. net.py defines make."),
        ("my-nets/net.py:make", "Python cannot import from the folder 'my-nets'. Rename the folder, so that its name"),
        ("my-nets/../net.py:my-func", "'my-func' cannot be the name of a Python function."),
        ("net-a.txt:make", "does not name a function. Write package.module:function"),
        ("notes.txt:make", "there is no module 'notes'"),
        ("json/net.py:make", "json/__init__.py, not from this folder. Rename the folder."),
    ],
)
def test_the_error_names_the_part_of_the_path_that_cannot_be_imported(here, path, expected):
    for file in ("net.py", "my-nets/net.py", "json/net.py", "net-a.txt", "notes.txt"):
        (here / file).parent.mkdir(exist_ok=True)
        (here / file).write_text("def make(): ...\n")
    with pytest.raises(InputError) as caught:
        import_function(path)
    assert expected in str(caught.value)


def test_a_path_can_start_with_the_current_folder(here):
    (here / "our_nets_f.py").write_text("def build():\n    return 3\n")
    assert import_function("./our_nets_f.py:build")() == 3


def test_a_function_can_be_given_by_its_file(here):
    (here / "nets_d").mkdir()
    (here / "nets_d" / "our_nets_d.py").write_text("def build():\n    return 3\n")
    assert is_function_path("nets_d/our_nets_d.py:build")
    assert import_function("nets_d/our_nets_d.py:build")() == 3


def test_a_file_can_be_in_another_folder(here, monkeypatch):
    for folder in ("nets_e", "project"):
        (here / folder).mkdir()
    (here / "nets_e" / "our_sizes_e.py").write_text("SIZE = 7\n")
    (here / "nets_e" / "our_nets_e.py").write_text("import our_sizes_e\ndef build():\n    return our_sizes_e.SIZE\n")
    (here / "project" / "our_nets_e.py").write_text("def build():\n    raise AssertionError\n")
    monkeypatch.chdir(here / "project")
    assert import_function("../nets_e/our_nets_e.py:build")() == 7
    assert import_function(f"{here}/nets_e/our_nets_e.py:build")() == 7
    with pytest.raises(InputError, match=r"'our_nets_e' is already the name of .*nets_e/our_nets_e\.py\. Rename our_n"):
        import_function(f"{here}/project/our_nets_e.py:build")
    (here / "nets_e" / "our.nets.py").write_text("def build(): ...")
    with pytest.raises(InputError, match=r"'our\.nets' cannot be the name of a Python module\. Rename the file\."):
        import_function("../nets_e/our.nets.py:build")


def test_a_local_file_does_not_shadow_an_installed_package(here):
    (here / "safetensors.py").write_text("def save():\n    raise AssertionError\n")
    assert not str(sys.modules.get("safetensors", "")).startswith(str(here))
    assert import_function("safetensors.torch:save").__module__ == "safetensors.torch"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (":build", "package.module:function"),
        ("pack age:build", "package.module:function"),
        ("no_such_module_anywhere:build", "no module 'no_such_module_anywhere'"),
        ("json.nothing:loads", "no module 'json.nothing'"),
        ("no_such_file_anywhere.py:build", "no file 'no_such_file_anywhere.py' in"),
        ("../other/no_such_net.py:build", "there is no file 'no_such_net.py' in"),
        ("json:laods", "Did you mean 'loads'?"),
        ("json:decoder", "of type module"),
    ],
)
def test_a_wrong_path_raises_an_error_with_the_reason(path, expected):
    with pytest.raises(InputError) as caught:
        import_function(path)
    assert expected in str(caught.value)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import not_installed_here", "No module named 'not_installed_here'"),
        ("from json import lodas", "cannot import name 'lodas'"),
        ("def build(:", "SyntaxError"),
    ],
)
def test_an_import_error_in_the_users_module_is_in_the_message(here, text, expected):
    (here / "our_nets_b.py").write_text(text)
    with pytest.raises(InputError, match="importing 'our_nets_b' failed") as caught:
        import_function("our_nets_b:build")
    assert expected in str(caught.value)


def test_an_exception_in_the_users_module_is_reported_with_file_and_line(here):
    (here / "our_nets_c.py").write_text("1 / 0\n")
    with pytest.raises(InputError) as raised:
        import_function("our_nets_c:build")
    place = f"{here / 'our_nets_c.py'}, line 1 (1 / 0)"
    assert str(raised.value) == (
        f"'our_nets_c:build': importing 'our_nets_c' failed in {place}: ZeroDivisionError: division by zero"
    )
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_for_a_missing_module_the_error_suggests_the_path_of_a_file(here):
    with pytest.raises(InputError, match=r"the path of a file .* 'ours/nets.py:build' or 'folder/ours/nets.py:bu"):
        import_function("ours.nets:build")
    (here / "ours").mkdir()
    (here / "ours" / "nets.py").write_text("def build(): return 3\n")
    assert import_function("ours/nets.py:build")() == 3
    with pytest.raises(InputError, match=r"package\.module:function or folder/file\.py:function"):
        named("importance", ["magnitude"])("magnitud")


def test_an_exception_in_the_users_function_is_reported_with_file_and_line():
    def build():
        raise KeyError("depth")

    with pytest.raises(InputError, match=rf"'x:build' failed in {__file__}, line \d+ .*: KeyError: 'depth'"):
        call_with("x:build", build)


def test_only_values_that_are_accepted_are_given():
    assert call_with("x:f", lambda: "none", num_classes=3) == "none"
    assert call_with("x:f", lambda num_classes=1: num_classes, num_classes=3) == 3
    assert call_with("x:f", lambda **options: options, num_classes=3) == {"num_classes": 3}
    with pytest.raises(InputError, match=r"missing a required argument: 'depth'.*num_classes"):
        call_with("x:f", lambda depth: depth, num_classes=3)


RECORD = """
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    classes: int
"""


def test_a_wrong_value_for_a_users_class_raises_one_error(here):
    (here / "our_metric.py").write_text(RECORD)
    expected = "'our_metric:Metric': Metric.classes: Input should be a valid integer, unable to parse string as an "
    with pytest.raises(InputError) as caught:
        call_with("our_metric:Metric", import_function("our_metric:Metric"), classes="four")
    assert str(caught.value) == f"{expected}integer, got 'four'."
