"""``mergemill schema``: the JSON schema of recipes, for editors."""

from mergemill.cli import console


def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    Example: mergemill schema > recipe.schema.json
    """
    from mergemill.engine import recipe_schema
    from mergemill.engine.methods import find_methods

    console.say_json(recipe_schema([*find_methods()]))
