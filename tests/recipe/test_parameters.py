from __future__ import annotations

from tersor.methods.ptq import PTQ
from tersor.recipe.parameters import parameters


def test_types_are_named_as_a_user_writes_them():
    types = {name: kind for name, kind, _default, _description in parameters(PTQ)}
    assert types["bits"] == "int"
    assert types["percentile"] == "float"
    assert types["max_drop"] == "float or none"
    assert types["variance_correction"] == "bool or none"
    assert types["weight_range"] == "minmax or percentile or mse or output_mse or none"


def test_defaults_and_descriptions_are_those_of_the_fields():
    found = {name: (default, description) for name, _kind, default, description in parameters(PTQ)}
    assert found["bits"] == ("8", "bits of a weight")
