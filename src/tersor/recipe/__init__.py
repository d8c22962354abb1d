"""A recipe: YAML text, checked and turned into plain data. Needs no torch."""

from tersor.recipe.changes import changes
from tersor.recipe.parameters import MethodDescription, describe, documentation, parameters
from tersor.recipe.schema import DataSource, Network, Recipe, Stage, Teacher, parse, read, schema, write

__all__ = [
    "DataSource",
    "MethodDescription",
    "Network",
    "Recipe",
    "Stage",
    "Teacher",
    "changes",
    "describe",
    "documentation",
    "parameters",
    "parse",
    "read",
    "schema",
    "write",
]
