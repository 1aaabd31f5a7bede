"""Typed recipes: what a run is, read from YAML, checked, and written back so that it runs again."""

from megavlm.config.errors import Mistake, RecipeError
from megavlm.config.load import dump_recipe, load_blocks, load_recipe, parse_recipe
from megavlm.config.schema import Block, Recipe

__all__ = ["Block", "Mistake", "Recipe", "RecipeError", "dump_recipe", "load_blocks", "load_recipe", "parse_recipe"]
