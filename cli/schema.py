"""``mergemill schema``: the JSON schema of recipes, for editors."""

from typing import Annotated

import typer

from mergemill.cli import console

Of = Annotated[str, typer.Option(help="Of which document: recipe, mixture (experts:) or adapters.")]


def schema(of: Of = "recipe") -> None:
    """Print the JSON schema of recipes, for editors.

    Example: mergemill schema > recipe.schema.json
    """
    from mergemill.engine import recipe_schema
    from mergemill.engine.methods import find_coefficients, find_methods, find_steps

    console.say_json(recipe_schema([*find_methods()], of, post=[*find_steps()], coefficients=[*find_coefficients()]))
