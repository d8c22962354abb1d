"""Constructors of methods, tasks and recipes: a wrong value raises one plain error message."""

from __future__ import annotations

import copy
import pickle
from typing import Annotated

import pytest
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from tersor import methods, tasks
from tersor.core.errors import InputError
from tersor.core.plain_values import PlainRecord, in_one_line, plain_dataclass
from tersor.core.target import Target
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.ptq import PTQ
from tersor.methods.soft_targets import SoftTargets
from tersor.recipe import DataSource, Network, Recipe, Stage, Teacher
from tersor.training.options import LearningRateSchedule, OptimizerOptions, Training

RECORDS = [Target, Training, OptimizerOptions, LearningRateSchedule, Recipe, Stage, Network, Teacher, DataSource]
METHODS = [methods.get(name) for name in methods.names()]
TASKS = [tasks.get(name) for name in tasks.NAMES]


@pytest.mark.parametrize("kind", [*RECORDS, *METHODS, *TASKS], ids=lambda kind: kind.__name__)
def test_the_error_for_an_unknown_parameter_lists_the_valid_ones(kind):
    with pytest.raises(InputError, match=rf"{kind.__name__} .*tempeature") as caught:
        kind(tempeature=4)
    assert "pydantic" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SoftTargets(tempeature=4),
            "SoftTargets has no parameter 'tempeature'. Did you mean 'temperature'? Possible: label_weight, loss_",
        ),
        (lambda: SoftTargets(temperature="hot"), "temperature should be a number, got 'hot'."),
        (lambda: SoftTargets("hot"), "temperature should be a number, got 'hot'."),
        (
            lambda: SoftTargets(1, 1, 1, False, 5),
            "SoftTargets takes 4 values: temperature, loss_weight, label_weight, standardize. More were given.",
        ),
        (
            lambda: PTQ(bits=9, first_last_bits=2.5),
            "bits is 9. It must be from 2 to 8.\nfirst_last_bits should be a whole",
        ),
        (lambda: ChannelPruning(scope="glob"), "scope should be 'layer' or 'global', got 'glob'. Did you"),
        (lambda: Training(optimizer={"nme": "sgd"}), "Training.optimizer has no parameter 'nme'. Did you mean"),
        (lambda: Training(optimizer={"name": "adamx"}), "optimizer.name should be 'sgd' or 'adamw', got 'adamx'."),
        (lambda: Training(optimizer="sgd"), "optimizer should be a mapping or OptimizerOptions, got 'sgd'."),
        (lambda: LearningRateSchedule(milestones=(0.5, 2)), "milestones.1 should be less than 1, got 2."),
        (lambda: Recipe(model={"name": "resnet20"}), "Recipe needs data.\nRecipe needs stages."),
        (lambda: Stage(name="a", methods=["pqt"]), "unknown method 'pqt'. Did you mean 'ptq'?"),
        (lambda: Stage(name="a", methods=[{"ptq": {"bit": 4}}]), "Stage has no parameter methods.0.ptq.bit."),
        (lambda: Stage(name="a b"), "a stage name may contain letters, digits, - and _, got 'a b'."),
        (lambda: DataSource(name="digits", image_size="big"), "image_size should be a whole number or a list, got"),
        (lambda: Network(name=""), "name should be text that is not empty, got ''."),
        (lambda: tasks.build("segmentation", num_clases=3), "Segmentation has no parameter 'num_clases'."),
    ],
)  # fmt: skip
def test_an_invalid_value_raises_a_one_line_error(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_records_take_keyword_arguments_only():
    with pytest.raises(InputError, match=r"Target takes keyword arguments only, got 'openvino'\. Arguments: runtime, "):
        Target("openvino")


class Even(PlainRecord):
    number: int

    @model_validator(mode="after")
    def is_even(self):
        if self.number % 2:
            raise ValueError("number is odd")
        return self


def test_a_failed_check_of_the_whole_record_raises_a_one_line_error():
    with pytest.raises(InputError, match=r"^number is odd$"):
        Even(number=3)


@plain_dataclass(frozen=True)
class Rate:
    """A user's own method that checks its parameters."""

    rate: float

    @field_validator("rate")
    @classmethod
    def is_positive(cls, rate):
        assert rate >= 0, "the rate is below 0"
        if not rate:
            raise ValueError
        return rate


@pytest.mark.parametrize(
    ("rate", "message"),
    [(-1, "the rate is below 0"), (0, "Rate does not accept 0"), ("x", "rate should be a num")],
)
def test_an_exception_in_a_users_check_becomes_the_error_message(rate, message):
    with pytest.raises(InputError, match=f"^{message}"):
        Rate(rate=rate)


def test_a_class_defined_in_a_function_can_use_local_names_in_annotations():
    """With `from __future__ import annotations`, as here, annotations are strings."""
    Share = Annotated[float, Field(lt=1)]  # noqa: N806

    @plain_dataclass(frozen=True)
    class Local:
        share: Share = 0.5

    assert Local(0.25).share == 0.25
    with pytest.raises(InputError, match=r"^share is 2\. It must be below 1\.$"):
        Local(2)


def test_a_pydantic_error_is_formatted_as_one_line():
    with pytest.raises(ValidationError) as of_values:
        TypeAdapter(dict[str, SoftTargets]).validate_python({"a": {"temperature": 0, "heat": 1}})
    title = of_values.value.title
    assert in_one_line(of_values.value) == (
        f"{title}.a.temperature: Input should be greater than 0, got 0; {title}.a.heat: Unexpected keyword argument"
    )


def test_pydantic_validators_bypass_the_constructors():
    """Errors in a recipe are reported with lines of the file, so the recipe reader has to get pydantic's own error."""
    for kind in (Training, SoftTargets):
        with pytest.raises(ValidationError):
            TypeAdapter(kind).validate_python({"tempeature": 4})


@pytest.mark.parametrize("value", [SoftTargets(temperature=2), Training(batch_size=3), Target()])
def test_records_can_be_copied_and_pickled(value):
    assert copy.deepcopy(value) == value
    assert pickle.loads(pickle.dumps(value)) == value
