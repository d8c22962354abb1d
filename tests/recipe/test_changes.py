"""The differences between two recipes, as shown in the message of `--resume`."""

from __future__ import annotations

import pytest
from example_recipe import WHOLE

from tersor.recipe import changes, parse, write


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", ""),
        ("seed: 3\ncheckpoint_every: 10\n", "seed: 3\n", "checkpoint_every: 10, now the default 200"),
        ("", "seed: 3\n", "seed: not set, now 3"),
        ("epochs: 30", "epochs: 20", "stages.0.epochs: 30, now 20"),
        ("bits: 4", "bits: 6", "stages.1.methods.0.ptq.bits: 4, now 6"),
        ("name: resnet20", "name: resnet32", "model.name: 'resnet20', now 'resnet32'"),
    ],
)
def test_the_first_differing_keys_are_shown_with_both_values(old: str, new: str, expected: str):
    def recipe(text: str):
        return parse(text + WHOLE if text.endswith("\n") else WHOLE.replace(old, text), "recipe.yaml")

    assert changes(write(recipe(old)), recipe(new)) == expected


def test_further_differences_are_counted_and_invalid_text_has_none():
    recipe = parse(WHOLE, "recipe.yaml")
    before = (
        WHOLE.replace("epochs: 30", "epochs: 1")
        .replace("bits: 4", "bits: 5")
        .replace("temperature: 3", "temperature: 5")
    )
    before = write(parse("seed: 7\n" + before, "recipe.yaml"))
    assert changes(before, recipe).endswith("; and 1 more")
    assert changes("[", recipe) == ""
