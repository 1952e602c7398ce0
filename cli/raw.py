"""What ``--raw`` and the options beside it mean: a plan of dictionaries of tensors, not of language models."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from mergemill.engine import values

RAW_WORDS = {
    "raw": ("--raw",),
    "raw union": ("--raw", "--union"),
    "raw intersection": ("--raw", "--intersection"),
}
"""The options by which a plan of such a kind is asked for."""


def make_any_plan(
    recipe: "values.AnyRecipe", *, raw: bool, union: bool, intersection: bool, **options: Any
) -> "values.Plan":
    """Return the plan of a recipe; the options are those of `make_plan`."""
    check_raw(raw=raw, union=union, intersection=intersection)
    if not raw:
        from mergemill.engine import make_plan

        return make_plan(recipe, **options)
    from mergemill.engine import make_raw_plan

    return make_raw_plan(recipe, names="union" if union else "intersection" if intersection else "same", **options)


def check_raw(*, raw: bool, union: bool, intersection: bool) -> None:
    """Refuse options that do not go together."""
    if union and intersection:
        raise typer.BadParameter("--union and --intersection exclude each other")
    if (union or intersection) and not raw:
        raise typer.BadParameter("--union and --intersection are for --raw")
