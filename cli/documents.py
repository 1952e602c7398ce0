"""What a command is given, by its keys: a recipe, or a document with adapters."""

from typing import TYPE_CHECKING, Any

import typer

from mergemill.cli.raw import make_any_plan
from mergemill.cli.recipes import open_recipe

if TYPE_CHECKING:
    from mergemill.engine import values


def plan_with_stages(
    given: str,
    keep_stages: str | None,
    *,
    raw: bool,
    union: bool,
    intersection: bool,
    memory: str | None = None,
    **options: Any,
) -> "list[tuple[str | None, values.Plan]]":
    """Return the plans of the stages that are written too, and where, and at last that of the result.

    keep_stages: a folder for all stages; where one says `keep`, that place holds. memory: what measuring may take.
    """
    from mergemill.engine import list_kept, names_adapters

    how: dict[str, Any] = {"raw": raw, "union": union, "intersection": intersection, **options}
    if given == "-" or not names_adapters(given):
        recipe = open_recipe(given)
        kept = [(place, make_any_plan(stage, **how)) for place, stage in list_kept(recipe, keep_stages)]
        return [*kept, (None, make_any_plan(recipe, **how))]
    from mergemill.engine import make_adapter_plan

    if raw:
        raise typer.BadParameter("--raw is for models, not for adapters")
    return [(None, make_adapter_plan(given, seed=options["seed"], storage=options["storage"], memory=memory))]
