"""A recipe: YAML text, checked and turned into plain data. Needs no torch."""

from tersor.recipe.parameters import parameters
from tersor.recipe.schema import DataSource, Network, Recipe, Stage, Teacher, parse, read, schema, write

__all__ = ["DataSource", "Network", "Recipe", "Stage", "Teacher", "parameters", "parse", "read", "schema", "write"]
