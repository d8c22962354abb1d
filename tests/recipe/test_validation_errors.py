"""Every mistake in a recipe gives one message with its line, the given value and the possible values."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from example_recipe import WHOLE
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.errors import InputError
from tersor.methods.soft_targets import SoftTargets
from tersor.recipe import Stage, parse, read


def mistakes(text: str) -> list[str]:
    """The lines of the error message for `text`."""
    with pytest.raises(InputError) as caught:
        parse(text, "recipe.yaml")
    return str(caught.value).splitlines()


@settings(deadline=None)  # the machine may be busy
@given(st.text() | st.text(alphabet=":- \n[]{}&*!'\"?|>%#,abc013.e", max_size=40))
def test_any_text_gives_an_input_error(text: str):
    with pytest.raises(InputError):
        parse(text, "recipe.yaml")


@settings(deadline=None)  # the machine may be busy
@given(st.data())
def test_a_damaged_recipe_raises_no_other_error(data: st.DataObject):
    place = data.draw(st.integers(0, len(WHOLE)))
    text = WHOLE[:place] + data.draw(st.text(max_size=3)) + WHOLE[place + data.draw(st.integers(0, 9)) :]
    with suppress(InputError):
        parse(text, "recipe.yaml")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("teacher:", "teachr:", "line 3: unknown key 'teachr'. Did you mean 'teacher'? Possible: checkpoint_every,"),
        ("epochs: 30", "epoch: 30", "line 8: unknown key 'epoch'. Did you mean 'epochs'? Possible: accumulate,"),
        ("name: adamw", "nam: adamw", "line 13: unknown key 'nam'. Did you mean 'name'? Possible: learning_rate,"),
        ("bits: 4", "bist: 4", "line 16: unknown key 'bist'. Did you mean 'bits'? Possible: activation_bits,"),
        ("temperature: 3", "temperature: 0", "methods.0.soft_targets.temperature should be greater than 0, got 0."),
        ("bits: 4", "bits: 0", "line 16: stages.1.methods.0.ptq.bits should be greater than or equal to 2, got 0."),
        ("bits: 4", "bits: '4'", "line 16: stages.1.methods.0.ptq.bits should be a whole number, got the text '4'."),
        ("bits: 4", "bits: 4.5", "line 16: stages.1.methods.0.ptq.bits should be a whole number, got 4.5."),
        ("bits: 4", "exclude: [conv1, 3]", "exclude.1 should be text, got 3. Put it in quotes to make it text."),
        (
            "bits: 4",
            "exclude: conv1",
            "line 16: stages.1.methods.0.ptq.exclude should be a list, got the text 'conv1'.",
        ),
        (
            "  bits: 4",
            "bits: 4",
            "line 15: a method must be one key with its parameters inside, got the keys ptq, bits.",
        ),
        ("epochs: 30", "epochs: true", "line 8: stages.0.epochs should be a whole number, got true."),
        ("epochs: 30", "epochs: -1", "line 8: stages.0.epochs should be greater than or equal to 0, got -1."),
        ("epochs: 30", "epochs: .inf", "line 8: a number should be finite, got .inf."),
        ("epochs: 30", "epochs: !big 30", "line 8: the tag !big is not supported."),
        ("epochs: 30", "epochs: 30\n    epochs: 3", "line 9: the key 'epochs' is given twice, first on line 8."),
        (
            "epochs: 30",
            "epochs: 30\n    steps: 7",
            "line 9: a stage cannot have both epochs and steps, got epochs: 30 and steps: 7. Remove one.",
        ),
        ("epochs: 30", "epochs: 0", "line 10: 'soft_targets' needs training, and stage"),
        ("name: quantize", "name: Distil", "line 11: there is already a stage 'distil'"),
        ("name: quantize", "name: a/b", "line 11: a stage name may contain letters, digits, - and _, got 'a/b'."),
        ("name: adamw", "name: adam", "'sgd' or 'adamw', got the text 'adam'. Did you mean 'adamw'?"),
        ("openvino}", "openvin}", "line 5: target.runtime should be 'onnxruntime' or 'openvino', got"),
        (
            "{runtime: openvino}",
            "openvino",
            "line 5: target should be a mapping with the keys runtime, cpu, input, batch, got",
        ),
        ("name: resnet20, ", "", "line 2: model needs 'name'."),
        (
            "folder",
            "name: digits, folder",
            "line 4: data needs exactly one of folder, csv, name, got folder and name. Keep one of them.",
        ),
        (
            "folder: data/cifar10",
            "limit: 5",
            "line 4: data needs exactly one of folder, csv, name, got none. Write one of them.",
        ),
        ("folder", "mean: [0, 0, 0], folder", "line 4: data has `mean` without `std`. Write both"),
        ("folder", "mean: [0, 0], std: [1, 1], folder", "line 4: data.mean has 2 numbers, and the images have 3"),
        ("folder", "image_size: [4], folder", "line 4: data.image_size"),
        ("folder", "std: [1, 0, 1], folder", "line 4: data.std.1 should be greater than 0, got 0."),
        ("soft_targets", "kd", "line 10: unknown method 'kd'. Did you mean 'soft_targets'? Possible: "),
        ("soft_targets", "soft_target", "line 10: unknown method 'soft_target'. Did you mean 'soft_targets'?"),
        ("soft_targets", "nowhere:Method", "line 10: 'nowhere:Method': there is no module 'nowhere', neither"),
        (
            "[{soft_targets: {temperature: 3, loss_weight: 0.5}}]",
            "[3]",
            "line 10: a method must be a name, or a name with",
        ),
        (
            "[{soft_targets: {temperature: 3, loss_weight: 0.5}}]",
            "[ptq, ptq]",
            "line 10: stage 'distil' lists the method",
        ),
    ],
)
def test_one_mistake_gives_a_one_line_message(old: str, new: str, expected: str):
    lines = mistakes(WHOLE.replace(old, new, 1))
    assert len(lines) == 1, lines
    assert lines[0].startswith("recipe.yaml, line ")
    assert expected in lines[0]


def test_several_mistakes_are_reported_together_in_the_order_of_the_text():
    text = WHOLE.replace("teacher:", "teachr:").replace("epochs: 30", "epochs: x").replace("bits: 4", "bits: 0")
    assert [line.partition(":")[0] for line in mistakes(text)] == [f"recipe.yaml, line {line}" for line in (3, 8, 16)]


def test_the_error_for_a_missing_teacher_explains_what_to_write():
    text = WHOLE.replace("teacher: {name: resnet56, num_classes: 10, weights: teacher.safetensors}", "seed: 1")
    (line,) = mistakes(text)
    assert line.startswith("recipe.yaml, line 10: 'soft_targets' needs a teacher, and the recipe has none.")
    assert "teacher: {name: ..., weights: ...}" in line
    assert "teacher: original" in line


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (
            "orignal",
            ["teacher should be a mapping with the keys name, num_classes, weights, epochs, training or 'original'"],
        ),
        ("{nam: a}", ["teacher needs 'name'.", "unknown key 'nam'. Did you mean 'name'?"]),
    ],
)
def test_an_invalid_teacher_is_reported_according_to_its_type(teacher: str, expected: list[str]):
    lines = mistakes(f"model: {{name: a}}\nteacher: {teacher}\ndata: {{name: digits}}\nstages: [{{name: s}}]")
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"recipe.yaml, line 2: {part}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml, line 1: a recipe should be a mapping with the keys model, teacher, task, data, target,"),
        ("# nothing\n", "got nothing."),
        ("- a\n- b", "stages, got a list of length 2."),
        ("hello", "got the text 'hello'."),
        ("model: {name: a", "line 1: this is not YAML: "),
        ("a: 1\nb: c: d", "line 2: this is not YAML: mapping values are not allowed here."),
        ("a: 1\n---\nb: 2", "line 2: this is not YAML: expected a single document"),
        ("a: 1\n\tb: 2", "line 2: this is not YAML: "),
        ("a: \0", "recipe.yaml: this is not YAML text: special characters are not allowed."),
        ("a: &x\n  b: *x", "line 2: the alias *x refers to a value that contains it."),
        ("a: " + "[" * 30 + "]" * 30, "nested too deeply"),
        ("[" * 2000, "nested too deeply"),
        ('a: "x\\ud800"', "line 1: text should have no control characters"),
        ("? [a]\n: 1", "line 1: a key should be a name"),
        (
            "{model: {name: a}, data: {name: digits}, stages: []}",
            "stages should be a list of length at least 1, got a list of length 0.",
        ),
    ],
)
def test_text_that_is_not_a_recipe_raises(text: str, expected: str):
    assert expected in mistakes(text)[0]


LENIENT = """
from pydantic.dataclasses import dataclass

@dataclass(frozen=True)
class Cubic:
    sparsity: float = 0.5

    def attach(self, model, context): ...
"""


def test_unknown_options_of_a_users_lenient_method_raise(tmp_path, monkeypatch):
    (tmp_path / "lenient.py").write_text(LENIENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    stages = 'stages:\n  - name: a\n    steps: 1\n    methods: [{"lenient.py:Cubic": %s}]'
    text = WHOLE[: WHOLE.index("stages:")] + stages
    assert mistakes(text % "{sparsty: 0.3}")[0].endswith(
        "unknown key 'sparsty'. Did you mean 'sparsity'? Possible: sparsity."
    )
    assert parse(text % "{sparsity: 0.3}", "recipe.yaml").stages[0].methods[0].sparsity == 0.3


CHECKED = """
from pydantic import field_validator
from pydantic.dataclasses import dataclass

@dataclass(frozen=True)
class Cubic:
    sparsity: float = 0.5

    @field_validator("sparsity")
    @classmethod
    def is_a_fraction(cls, sparsity):
        assert sparsity < 1, "sparsity is a fraction"
        if sparsity < 0:
            sparsity /= 0
        return sparsity

    def attach(self, model, context): ...
"""


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        ("2", "sparsity is a fraction."),
        (
            "-1",
            "method 'checked.py:Cubic' failed in {folder}/checked.py, line 14 (sparsity /= 0): ZeroDivisionError: ",
        ),
    ],
)
def test_an_exception_in_a_users_check_is_reported(sparsity, expected, tmp_path, monkeypatch):
    (tmp_path / "checked.py").write_text(CHECKED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "checked", raising=False)
    stages = f'stages:\n  - {{name: a, steps: 1, methods: [{{"checked.py:Cubic": {{sparsity: {sparsity}}}}}]}}'
    (line,) = mistakes(WHOLE[: WHOLE.index("stages:")] + stages)
    assert line.partition(": ")[2].startswith(expected.format(folder=tmp_path))


@dataclass(frozen=True)
class WithoutChecks:
    sparsity: float = 0.5

    def attach(self, model, context): ...


@pytest.mark.parametrize("given", [WithoutChecks(2), SoftTargets])
def test_an_object_that_is_not_a_method_instance_raises(given):
    with pytest.raises(
        InputError, match=r"^(WithoutChecks|SoftTargets) is not an instance of a method. A compression method is a "
    ):
        Stage(name="a", steps=1, methods=[given])


def test_a_duplicate_key_and_a_wrong_value_are_reported_together():
    assert mistakes("a: 1\na: 2\nb: .nan") == [
        "recipe.yaml, line 2: the key 'a' is given twice, first on line 1.",
        "recipe.yaml, line 3: a number should be finite, got .nan.",
    ]


def test_files_that_are_not_recipes_raise(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_bytes(b"\x89PNG\xff\x00")
    with pytest.raises(InputError, match=r"file .*recipes.yaml not found. Did you mean .*recipe.yaml\? Possible in"):
        read(tmp_path / "recipes.yaml")
    with pytest.raises(InputError, match=r"is a folder. A recipe is a YAML file. Possible in .*: recipe.yaml"):
        read(tmp_path)
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / ("a" * 999))
