"""The steps of CONTRIBUTING.md lead from an empty file to a method that satisfies the laws."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import tersor.methods

ROOT = Path(__file__).parents[1]
FENCE = r"```{}\n(.*?)^```"
WALK = re.search(
    r"^## A new method in ten minutes\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
)[1]
FILES = re.findall(r"Create `([\w/]+\.py)`:\n\n" + FENCE.format("python"), WALK, re.MULTILINE | re.DOTALL)
COMMANDS = "".join(re.findall(FENCE.format("sh"), WALK, re.MULTILINE | re.DOTALL)).splitlines()
NEEDED = (
    "src",
    "tests/laws",
    "tests/methods",
    "recipes",
    "pyproject.toml",
    "tests/captured_once.py",
    "tests/conftest.py",
    "tests/decomposed_once.py",
    "tests/onnx_files.py",
    "tests/recorded_once.py",
    "tests/recorded_progress.py",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files needed by the steps, with the new files added."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in NEEDED:
        source = ROOT / name
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    for name, text in FILES:
        assert not (copy / name).exists(), f"{name} already exists"
        (copy / name).write_text(text)
    return copy


def run(command, folder):
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    for name in [key for key in environment if key.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_steps_create_a_method_and_a_test():
    assert [name.rpartition("/")[0] for name, _ in FILES] == ["src/tersor/methods", "tests/methods"]
    assert len(COMMANDS) == 2


def test_the_new_test_passes(checkout, monkeypatch):
    """In this process, which is faster than running the commands."""
    monkeypatch.setattr(tersor.methods, "__path__", [*tersor.methods.__path__, str(checkout / "src/tersor/methods")])
    (path,) = (checkout / name for name, _ in FILES if name.startswith("tests/"))
    try:
        tests = [value for name, value in runpy.run_path(str(path)).items() if name.startswith("test_")]
        assert tests
        for test in tests:
            test()
    finally:
        sys.modules.pop("tersor.methods.logit_matching", None)
        vars(tersor.methods).pop("logit_matching", None)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_succeed(command, checkout):
    python, *arguments = shlex.split(command)
    assert python == ".venv/bin/python"
    output = run([sys.executable, *arguments, "-p", "no:cacheprovider"], checkout)
    assert re.search(r"100%", output), output


def test_the_files_pass_the_linter(checkout):
    for command in (["check"], ["format", "--check"]):
        run([sys.executable, "-m", "ruff", *command, *(name for name, _ in FILES)], checkout)


def test_the_pre_commit_hooks_use_the_linter_of_the_environment():
    config = YAML(typ="safe").load(ROOT / ".pre-commit-config.yaml")
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    assert [shlex.split(hook["entry"])[:2] for hook in hooks] == [
        [".venv/bin/ruff", "check"],
        [".venv/bin/ruff", "format"],
    ]
