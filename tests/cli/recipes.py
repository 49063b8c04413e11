"""The toy recipe of the command line's tests, and how to change it."""

from pathlib import Path

import yaml

from tests.conftest import toy_recipe

FIT = ["fit", "--config", "recipe.yaml"]


def edit_recipe(path: str, value: object) -> None:
    """Set a dotted key of recipe.yaml to a value."""
    recipe = toy_recipe()
    node = recipe
    *parents, last = path.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
