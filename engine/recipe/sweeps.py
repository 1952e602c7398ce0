"""Sweeps: all combinations of values that stand on a command line."""

from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation

import yaml

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.recipe.searches import SearchFile, Strategy, Variable, Variables
from mergemill.engine.recipe.settings import Scalar

MOST = 100_000  # values of one variable


def make_sweep(recipe: str, vary: Sequence[str], objective: Objective) -> SearchFile:
    """Return the search of all combinations of values of a recipe's variables; the first changes last.

    vary: ``name=from:to:step``, the end included where a step meets it, or ``name=a,b,c``.
    """
    variables: dict[str, Variable] = {}
    for words in vary:
        name, found, values = words.partition("=")
        if not found or not name.strip() or not values.strip():
            raise RecipeError(f"--vary {words}: must be name=from:to:step, or name=a,b,c")
        if name in variables:
            raise RecipeError(f"--vary {words}: {name} is varied twice")
        variables[name] = Variable(choices=tuple(dict.fromkeys(_read_values(values, words))))
    if not variables:
        raise RecipeError("a sweep needs --vary, such as --vary chat=0:1:0.25")
    if not recipe.strip():
        raise RecipeError("a sweep needs a recipe, and its path is empty")
    return SearchFile(
        recipe=recipe, variables=Variables(variables), objective=objective, strategy=Strategy(name="grid")
    )


def _read_values(values: str, words: str) -> Iterator[Scalar]:
    ends = values.split(":")
    if len(ends) == 3:
        yield from _iter_range(ends, words)
        return
    for item in values.split(","):
        found = yaml.safe_load(item) if item.strip() else None
        if not isinstance(found, bool | int | float | str):
            raise RecipeError(f"--vary {words}: {item!r} is no number, text or boolean")
        yield found


def _iter_range(ends: Sequence[str], words: str) -> Iterator[Scalar]:
    """Yield from the first to the last by a step, as decimals: 0.1 thrice is 0.3."""
    try:
        first, last, step = map(Decimal, ends)
    except InvalidOperation:
        raise RecipeError(f"--vary {words}: from, to and step must be numbers") from None
    if not step or (last - first) / step < 0 or not all(each.is_finite() for each in (first, last, step)):
        raise RecipeError(f"--vary {words}: a step of {step} does not lead from {first} to {last}")
    count = int((last - first) / step) + 1
    if count > MOST:
        raise RecipeError(f"--vary {words}: are {count} values; at most {MOST} can be varied")
    whole = all(each == each.to_integral() for each in (first, step))
    for place in range(count):
        value = first + place * step
        yield int(value) if whole else float(value)
