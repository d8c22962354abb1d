"""Recipes: from text to validated data and back, overrides, the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from example_recipe import WHOLE
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from pydantic.dataclasses import dataclass

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.methods.ptq import PTQ
from tersor.methods.soft_targets import SoftTargets
from tersor.recipe import DataSource, Network, Recipe, Stage, Teacher, parse, read, schema, write
from tersor.training.attachment import Attachment
from tersor.training.method import PLAIN_VALUES
from tersor.training.options import LearningRateSchedule, OptimizerOptions, Training


@dataclass(frozen=True, config=PLAIN_VALUES)
class OfTheUser:
    """A method that is defined outside of the package."""

    needs_teacher: ClassVar[bool] = False
    pattern: str = "a"
    layers: str | tuple[str, str] = "layer3"
    rates: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5,)

    def attach(self, model, **_):
        return model


OWN = f"{__name__}:OfTheUser"


def with_methods(methods: str) -> str:
    before = "model: {name: a}\nteacher: original\ndata: {name: digits}\nstages:\n- name: s\n  epochs: 1\n  methods: "
    return before + methods


def test_text_becomes_data():
    assert parse(WHOLE, "recipe.yaml") == Recipe(
        model=Network(name="resnet20", num_classes=10),
        teacher=Teacher(name="resnet56", num_classes=10, weights=Path("teacher.safetensors")),
        data=DataSource(folder=Path("data/cifar10")),
        target=Target(runtime="openvino"),
        stages=(
            Stage(name="distil", epochs=30, clip_norm=1e-4, methods=(SoftTargets(temperature=3.0, loss_weight=0.5),)),
            Stage(name="quantize", optimizer=OptimizerOptions(name="adamw"), methods=(PTQ(bits=4),)),
        ),
    )


def test_a_method_name_alone_uses_the_defaults():
    assert parse(with_methods("[soft_targets, ptq: ]"), "x").stages[0].methods == (SoftTargets(), PTQ())


def test_yaml_1_2_rules_are_used():
    methods = with_methods(f"[{{'{OWN}': {{pattern: 2:4, layers: [on, 010x]}}}}]")
    recipe = parse(methods.replace("epochs: 1", "epochs: 010\n  clip_norm: 1e-4\n  ema: 1.e-1"), "x")
    assert recipe.stages[0].methods == (OfTheUser(pattern="2:4", layers=("on", "010x")),)
    assert (recipe.stages[0].epochs, recipe.stages[0].clip_norm, recipe.stages[0].ema) == (10, 1e-4, 0.1)


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse(WHOLE, "x").seed = 3


def test_write_contains_only_values_that_differ_from_the_defaults():
    assert write(parse(WHOLE, "x")) == (
        "model: {name: resnet20, num_classes: 10}\n"
        "teacher: {name: resnet56, num_classes: 10, weights: teacher.safetensors}\n"
        "data: {folder: data/cifar10}\n"
        "target: {runtime: openvino}\n"
        "stages:\n"
        "  - name: distil\n"
        "    epochs: 30\n"
        "    clip_norm: 0.0001\n"
        "    methods:\n"
        "      - {soft_targets: {temperature: 3, loss_weight: 0.5}}\n"
        "  - name: quantize\n"
        "    optimizer: {name: adamw}\n"
        "    methods:\n"
        "      - {ptq: {bits: 4}}\n"
    )


words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=150) | st.sampled_from(
    [
        "2:4",
        "on",
        "1e-4",
        "3",
        "null",
        "~",
        "2024-01-01",
        "=",
        "<<",
        " a ",
        "a: b",
        "#",
        "*x",
        "!t",
        "",
        "'",
        "-",
        "?0",
        "...",
        "---",
        "C:\\data",
    ]
).filter(bool)
positive = st.floats(1e-9, 1e12)
networks = st.builds(
    Network, name=words, num_classes=st.none() | st.integers(1, 9), weights=st.none() | st.just(Path("w"))
)
teachers = st.builds(
    Teacher,
    name=words,
    weights=st.none() | st.just(Path("w")),
    epochs=st.integers(0, 9),
    training=st.builds(Training, batch_size=st.integers(1, 9)),
)
methods = st.lists(
    st.one_of(
        st.builds(SoftTargets, temperature=positive, loss_weight=positive),
        st.builds(PTQ, bits=st.integers(2, 8), exclude=st.lists(words, max_size=2).map(tuple)),
        st.builds(OfTheUser, pattern=words, layers=st.tuples(words, words) | words),
    ),
    unique_by=type,
)
stages = st.builds(
    Stage,
    name=st.from_regex(r"[A-Za-z0-9_-]{1,9}", fullmatch=True),
    steps=st.integers(1, 10**6),
    lr_schedule=st.builds(LearningRateSchedule, name=st.sampled_from(["step", "cosine"]), warmup_epochs=positive),
    methods=methods.map(tuple),
)
recipes = st.builds(
    Recipe,
    model=networks,
    teacher=teachers | st.just("original"),
    data=st.builds(DataSource, name=words, mean=st.just((0.1, 0.2, 1.0)), std=st.tuples(positive, positive, positive)),
    seed=st.integers(0, 2**32 - 1),
    stages=st.lists(stages, min_size=1, max_size=3, unique_by=lambda stage: stage.name.casefold()).map(tuple),
)


@settings(deadline=None)  # the machine may be busy
@given(recipes)
def test_a_written_recipe_is_read_back_unchanged(recipe: Recipe):
    assert parse(write(recipe), "again") == recipe


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    assert read(tmp_path / "recipe.yaml") == parse(WHOLE, "x")


def test_an_invalid_value_for_a_parameter_of_two_types_is_reported_once():
    def mistake(parameters: str) -> str:
        with pytest.raises(InputError) as caught:
            parse(with_methods(f"[{{'{OWN}': {{{parameters}}}}}]"), "recipe.yaml")
        return str(caught.value)

    assert mistake("layers: 3").endswith("layers should be text or a list, got 3. Put it in quotes to make it text.")
    assert mistake("layers: [a, 3]").endswith(".layers.1 should be text, got 3. Put it in quotes to make it text.")
    assert mistake("rates: [x]").endswith("rates.0 should be a number, got the text 'x'.")  # the list is long enough


def test_values_can_be_overridden(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(WHOLE.replace("      - ptq:\n          bits: 4\n", "      - ptq\n"))
    recipe = read(
        path,
        [
            "stages.0.epochs=3",
            "seed=7",  # is not in the file
            "stages.0.lr_schedule.name=step",  # nor is the mapping around this
            "stages.1.methods.0.ptq.bits=3",  # is there as a name without parameters
            "teacher=original",
            "data={name: digits, limit: 10}",
            "target.runtime=onnxruntime",
        ],
    )
    assert recipe.stages[0].epochs == 3
    assert recipe.seed == 7
    assert recipe.stages[0].lr_schedule.name == "step"
    assert recipe.stages[1].methods == (PTQ(bits=3),)
    assert recipe.teacher == "original"
    assert recipe.data == DataSource(name="digits", limit=10)
    assert recipe.target.runtime == "onnxruntime"


def test_a_key_that_contains_dots_can_be_overridden(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    name = f"{__name__}.py:OfTheUser"
    for methods in (f"[{{'{name}': {{rates: [0.5, 0.5]}}}}]", f"['{name}']"):
        path.write_text(with_methods(methods))
        recipe = read(path, [f"stages.0.methods.0.{name}.rates=[0.25, 0.75]"])
        assert list(recipe.stages[0].methods[0].rates) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("stages.2.epochs=3", "there is no '2' in stages. Possible: 0, 1."),
        ("stages.-1.epochs=3", "there is no '-1' in stages. Possible: 0, 1."),
        ("stages.x=3", "there is no 'x' in stages. Possible: 0, 1."),
        ("stagez.0.epochs=3", "unknown key 'stagez'. Did you mean 'stages'? Possible: checkpoint_every,"),
        ("stages.0.epoch=3", "unknown key 'epoch'. Did you mean 'epochs'? Possible: accumulate,"),
        ("stages.0.epochs.x=3", "stages.0.epochs is 30, and there is no 'x' in it."),
        ("stages.0.epochs=three", "stages.0.epochs should be a whole number, got the text 'three'."),
        ("stages.1.methods.0.ptq.bits=0", "stages.1.methods.0.ptq.bits should be greater than or equal to 2, got 0."),
        ("stages.0.epochs", "write it as path=value, such as stages.0.epochs=3."),
        ("=3", "write it as path=value"),
        ("a..b=3", "write it as path=value"),
        ("seed=[", "this is not YAML: "),
        ("stages.0.epochs=???", "values are missing: stages.0.epochs. Write them in place of ???, or add "),
        ("model=", "model should be a mapping with the keys name, num_classes, weights, got nothing."),
    ],
)
def test_invalid_overrides_raise(assignment: str, expected: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(WHOLE)
    with pytest.raises(InputError) as caught:
        read(tmp_path / "recipe.yaml", [assignment])
    assert str(caught.value).startswith(f"--set {assignment}: {expected}")


@pytest.mark.parametrize(
    "augment", ["flip", "own.module:function", "[RandomHorizontalFlip, {RandomCrop: {size: 32, padding: [4, 4]}}]"]
)
def test_an_augmentation_is_read_back_unchanged(augment):
    recipe = parse(with_methods("[]").replace("digits", f"digits, augment: {augment}"), "x")
    assert parse(write(recipe), "x") == recipe
    assert write(recipe) != write(parse(with_methods("[]"), "x"))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("crop", "unknown augmentation 'crop'"),
        ("3", "data.augment should be text or a list, got 3"),
        ("[3]", "data.augment.0 should be text or a mapping, got 3"),
        ("[{RandomCrop: 32}]", "data.augment.0.RandomCrop should be a mapping, got 32"),
        ("[]", "data.augment should be text or a list of length at least 1, got a list of length 0"),
    ],
)
def test_an_invalid_augmentation_raises(augment, message):
    with pytest.raises(InputError) as caught:
        parse(with_methods("[]").replace("digits", f"digits, augment: {augment}"), "x")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_schema_contains_every_method_with_its_parameters():
    document = json.loads(json.dumps(schema()))
    assert document["$ref"] == "#/$defs/Recipe"
    assert document["$defs"]["Recipe"]["required"] == ["model", "data", "stages"]
    assert document["$defs"]["Recipe"]["additionalProperties"] is False
    entries = document["$defs"]["Stage"]["properties"]["methods"]["items"]["anyOf"]
    parameters = next(entry["properties"]["ptq"] for entry in entries if "ptq" in entry.get("properties", {}))
    ptq = parameters["anyOf"][0]
    ptq = document["$defs"][ptq["$ref"].rpartition("/")[2]] if "$ref" in ptq else ptq
    assert ptq["properties"]["bits"]["minimum"] == 2
    assert ptq["additionalProperties"] is False
    for reference in (part.split('"')[0] for part in json.dumps(document).split('"$ref": "#/$defs/')[1:]):
        assert reference in document["$defs"]


def test_a_huge_recipe_file_is_not_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    with path.open("wb") as opened:
        opened.truncate(2**30)
    with pytest.raises(InputError, match="larger than 128 KiB"):
        read(path)


def test_an_endless_file_is_not_read():
    with pytest.raises(InputError, match="larger than 128 KiB"):
        read("/dev/zero")


@pytest.mark.parametrize("name", ["a\x00b.yaml", "a" * 5000])
def test_an_invalid_file_name_raises(name):
    with pytest.raises(InputError, match=r"cannot be read|there is no file"):
        read(name)


def test_exponentially_expanding_aliases_raise():
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi")]  # noqa: B905
    with pytest.raises(
        InputError, match=r"line 1: there are more than 20,000 values, including those that aliases repeat"
    ):
        parse("\n".join(lines), "recipe.yaml")


@pytest.mark.parametrize("text", ["[" * 2000, "- " * 60_000, "? " * 60_000, "a: " + "{a: " * 5000, "{" * 30])
def test_deep_nesting_raises(text):
    with pytest.raises(InputError, match=r"nested too deeply|not YAML"):
        parse(text, "recipe.yaml")


@pytest.mark.parametrize(
    "number", ["0x" + "f" * 20_000, "9" * 4200, "9" * 20_000, "0b" + "1" * 65, "-9223372036854775809"]
)
def test_a_number_with_too_many_digits_raises(number):
    with pytest.raises(InputError, match=r"at most 63 bits|cannot be read as int"):
        parse(f"seed: {number}", "recipe.yaml")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [executed]", "!!python/name:os.mkdir", "!x {}"])
def test_yaml_tags_do_not_create_objects(tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        parse(f"seed: {tag}", "recipe.yaml")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True, config=PLAIN_VALUES)
class Own:
    beta: float = 0.1

    def attach(self, model, context):
        return Attachment(model)


def test_all_parameters_of_a_users_method_are_written():
    stages = (Stage(name="a", methods=(Own(), PTQ())),)
    written = Recipe(model={"name": "resnet20"}, data={"name": "digits"}, stages=stages)
    own, shipped = written.model_dump(mode="json", exclude_defaults=True)["stages"][0]["methods"]
    assert own == {f"{__name__}:Own": {"beta": 0.1}}
    assert shipped == "ptq"
    assert "beta: 0.1" in write(written)
