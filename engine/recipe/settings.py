"""The settings of a merge as written: numbers, booleans, texts, gradients, conditions, unresolved.

A gradient is a tuple of scalars of one sort, never empty. Conditions are a tuple of `Condition`, never empty,
also where the recipe writes a single one without a list. So a setting is one of three: a scalar, a tuple
whose items are scalars, a tuple whose items are conditions.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, TypeAdapter

from mergemill.engine.recipe.faults import describe, make_faults, make_predicate, shorten
from mergemill.engine.recipe.shapes import FrozenMap, Value

Scalar = bool | int | float | str
Gradient = Annotated[tuple[Scalar, ...], Field(min_length=1)]

REGEX = "re:"


def _check_scalar(value: object) -> Scalar:
    """Return a finite number, a boolean or a text."""
    if isinstance(value, bool | str):
        return value
    if not isinstance(value, int | float):
        wanted = "a number, a boolean, a text, a list of numbers, or conditions"
        raise make_predicate("has no value" if value is None else f"must be {wanted}, not {describe(value)}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise make_predicate(f"is {describe(value)}; a setting must fit 64 bits")
    if not math.isfinite(value):
        raise make_predicate(f"is {value}; a setting must be a finite number")
    return value


def _check_plain(value: object) -> Scalar | tuple[Scalar, ...]:
    """Return a scalar or a gradient."""
    return _check_gradient(value) if isinstance(value, list | tuple) else _check_scalar(value)


def _check_gradient(items: list[Any] | tuple[Any, ...]) -> tuple[Scalar, ...]:
    if not items:
        raise make_predicate("is an empty list; a gradient needs at least one number")
    for place, item in enumerate(items):
        if _sort_of(item) is None:
            wanted = "an item of a gradient must be a number, a boolean or a text"
            raise make_faults([((place,), make_predicate(f"is {describe(item)}; {wanted}"))])
        if _sort_of(item) != _sort_of(items[0]):
            words = f"is {describe(item)}, but item 1 is {describe(items[0])}; a gradient holds one sort"
            raise make_faults([((place,), make_predicate(words))])
    return _GRADIENT.validate_python(items)


def _sort_of(item: object) -> str | None:
    if isinstance(item, bool):
        return "boolean"
    if isinstance(item, int | float):
        return "number"
    return "text" if isinstance(item, str) else None


def check_filter(value: object) -> object:
    """Return a filter that can be used: any text, or after ``re:`` a regular expression that compiles."""
    if value is None:
        return value
    if not isinstance(value, str):
        raise make_predicate(f"must be text, not {describe(value)}; put it in quotes")
    if value.startswith(REGEX):
        try:
            re.compile(value.removeprefix(REGEX))
        except (re.error, OverflowError, RecursionError) as error:
            raise make_predicate(f"is '{shorten(value)}', not a valid regular expression: {error}") from None
    return value


def matches_filter(given: str | None, tensor_name: str) -> bool:
    """Return whether a filter matches a tensor's name."""
    if given is None or given == "*":
        return True
    if given.startswith(REGEX):
        return re.search(given.removeprefix(REGEX), tensor_name) is not None
    return given in tensor_name


def _check_condition_value(value: object) -> Scalar | tuple[Scalar, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, Mapping) for item in items):
        raise make_predicate("must be a scalar or a gradient; a condition cannot hold another one")
    return _check_plain(value)


_CheckedScalar = Annotated[Scalar, BeforeValidator(_check_scalar, json_schema_input_type=Scalar)]
_GRADIENT = TypeAdapter(tuple[_CheckedScalar, ...])


class Condition(Value):
    """A value for the tensors whose names pass a filter; of several the first that matches holds."""

    called: ClassVar[str] = "a condition"
    elsewhere: ClassVar[Mapping[str, str]] = {"pattern": "did you mean 'filter'?"}  # as mergekit once called it

    filter: Annotated[str | None, BeforeValidator(check_filter)] = None
    """A part of the output tensor's name, or `re:` and a regular expression; absent or `*` matches all."""
    value: Annotated[
        Scalar | Gradient, BeforeValidator(_check_condition_value, json_schema_input_type=Scalar | Gradient)
    ]
    """A number, boolean or text, or a gradient over the layers."""

    def matches(self, tensor_name: str) -> bool:
        """Whether this condition holds for the output tensor of that name."""
        return matches_filter(self.filter, tensor_name)


Conditions = Annotated[tuple[Condition, ...], Field(min_length=1)]
_CONDITIONS = TypeAdapter(tuple[Condition, ...])


def _check_setting(value: object) -> Scalar | tuple[Scalar, ...] | tuple[Condition, ...]:
    if isinstance(value, Mapping | Condition):
        return (Condition.model_validate(value),)
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping | Condition) for item in value):
        return _check_conditions(value)
    return _check_plain(value)


def _check_conditions(items: list[Any] | tuple[Any, ...]) -> tuple[Condition, ...]:
    faults = [
        ((place,), make_predicate(f"is {describe(item)} among conditions; write it as '- value: …'"))
        for place, item in enumerate(items)
        if not isinstance(item, Mapping | Condition)
    ]
    if faults:
        raise make_faults(faults)
    return _CONDITIONS.validate_python(items)


Setting = Annotated[
    Scalar | Gradient | Conditions,
    BeforeValidator(_check_setting, json_schema_input_type=Scalar | Gradient | Condition | Conditions),
]


class Parameters(FrozenMap[Setting]):
    """Settings by parameter, sorted by name since their order means nothing."""

    __slots__ = ()

    holds: ClassVar[Any] = Setting

    def __init__(self, items: Mapping[str, Setting] | None = None) -> None:
        super().__init__(dict(sorted((items or {}).items())))
