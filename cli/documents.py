"""What a command is given, by its keys: a recipe, or a document with adapters."""

from typing import TYPE_CHECKING, Any

import typer

from mergemill.cli.raw import make_any_plan
from mergemill.cli.recipes import open_recipe

if TYPE_CHECKING:
    from mergemill.engine import values


def plan_document(given: str, *, raw: bool, union: bool, intersection: bool, **options: Any) -> "values.Plan":
    """Return the plan of a file, or of a recipe that comes in by stdin; the options are those of `make_plan`."""
    from mergemill.engine import names_adapters

    if given == "-" or not names_adapters(given):
        return make_any_plan(open_recipe(given), raw=raw, union=union, intersection=intersection, **options)
    from mergemill.engine import make_adapter_plan

    if raw:
        raise typer.BadParameter("--raw is for models, not for adapters")
    return make_adapter_plan(given, seed=options["seed"], storage=options["storage"])
