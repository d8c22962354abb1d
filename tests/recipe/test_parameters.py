from __future__ import annotations

from typing import ClassVar

from tersor.core.plain_values import plain_dataclass
from tersor.methods.ptq import PTQ
from tersor.recipe.parameters import describe, parameters


def test_types_are_named_as_in_a_recipe():
    types = {name: kind for name, kind, _default, _description in parameters(PTQ)}
    assert types["bits"] == "int"
    assert types["percentile"] == "float"
    assert types["max_drop"] == "float or none"
    assert types["variance_correction"] == "bool or none"
    assert types["weight_range"] == "minmax or percentile or mse or output_mse or none"


def test_defaults_and_descriptions_are_read_from_the_fields():
    found = {name: (default, description) for name, _kind, default, description in parameters(PTQ)}
    assert found["bits"] == ("8", "bits of a weight")


@plain_dataclass(frozen=True)
class Rate:
    """A method of the user, which cannot be built without a rate."""

    needs_steps: ClassVar[bool] = True

    rate: float

    @property
    def needs_teacher(self) -> bool:
        return self.rate > 1


def test_a_method_with_a_required_parameter_is_described_without_an_instance():
    assert [*parameters(Rate)] == [("rate", "float", "required", "")]
    described = describe(Rate)
    assert (described.needs_steps, described.needs_teacher) == (True, False)
    assert described.parameters["required"] == ["rate"]
    assert described.documentation == "A method of the user, which cannot be built without a rate."
