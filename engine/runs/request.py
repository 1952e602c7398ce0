"""What a call of the in-memory merge asks for: its arguments as the planner has them from a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Generic, TypeVar

from mergemill.engine.errors import PlanError
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.methods.contract import Method, Parameter
from mergemill.engine.plan.fill import say_count
from mergemill.engine.recipe import Parameters
from mergemill.engine.tensors.dtypes import NAMES, RECIPE_DTYPES
from mergemill.engine.tensors.lazy import Dtype, Tensor

T = TypeVar("T")
MethodOrName = str | Callable[..., Tensor]  # a name of the catalogue, or a function that `merge_method` decorates


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """What is to be merged, and how; the inputs as the method takes them, where there is a base it comes first."""

    inputs: tuple[T, ...]
    names: tuple[str, ...]  # what messages call the inputs
    has_base: bool  # whether the first is a base beside the models
    places: tuple[int, ...]  # each model's place in the recipe that would say the same
    method: Method
    shared: Parameters
    own: tuple[Parameters, ...]  # of each model
    seed: int
    dtype: str | None
    where: str  # the function that was called, for errors


def make_request(
    models: Sequence[T],
    method: Method,
    base: T | None,
    parameters: Mapping[str, Any],
    *,
    seed: int,
    dtype: Dtype | None,
    where: str,
) -> Request[T]:
    """Return the request; `PlanError` where method, models, base and parameters do not go together."""
    inputs, names, places, has_base = _arrange(models, method, base, where)
    shared, own = _split_parameters(parameters, method, len(inputs) - has_base, where)
    if dtype is not None and NAMES.get(dtype) not in RECIPE_DTYPES.values():
        raise PlanError(f"{where}: dtype is {dtype}; it must be one of {', '.join(RECIPE_DTYPES)}")
    to = None if dtype is None else NAMES[dtype]
    return Request(tuple(inputs), names, has_base, places, method, shared, own, seed, to, where)


def find_method(method: MethodOrName) -> Method:
    """Return the method that a name or a decorated function means."""
    if isinstance(method, str):
        return get_method(method)
    found = getattr(method, "method", None)
    if not isinstance(found, Method):
        raise PlanError(f"{method!r} is no merge method; give the name of one, or a function with @merge_method")
    return found


def _arrange(
    models: Sequence[T], method: Method, base: T | None, where: str
) -> tuple[list[T], tuple[str, ...], tuple[int, ...], bool]:
    """Return the inputs in the method's order, their names, the models' places, and whether the first is a base.

    A recipe's base that is not listed among its models takes the place after them.
    """
    if base is not None and method.base == "none":
        raise PlanError(f"{where}: {method.name} takes no base; give every model among the models")
    if base is None and method.base == "required":
        raise PlanError(f"{where}: {method.name} needs 'base'")
    numbered, places = [f"model {i + 1}" for i in range(len(models))], list(range(len(models)))
    apart = base is not None and method.base != "first of two"
    count = len(models) + (base is not None and not apart)
    if count < method.least_inputs or (method.most_inputs is not None and count > method.most_inputs):
        beside = " beside the base" if apart else ", one of them the base" if method.base == "first of two" else ""
        raise PlanError(f"{where}: {method.name} takes {say_count(method)}{beside}; here are {count}")
    if base is None:
        return list(models), tuple(numbered), tuple(places), False
    return (
        [base, *models],
        ("base", *numbered),
        tuple(places) if apart else (len(models), *places),
        apart,
    )


def _split_parameters(
    given: Mapping[str, Any], method: Method, models: int, where: str
) -> tuple[Parameters, tuple[Parameters, ...]]:
    """Return the parameters as a recipe has them: those of all models, and those of each."""
    known = {p.argument: p for p in method.parameters} | {p.name: p for p in method.parameters}
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(models)]
    for argument, value in given.items():
        if argument not in known:
            raise PlanError(f"{where}: {method.name} takes no parameter {argument!r}; {_suggest(argument, method)}")
        parameter = known[argument]
        if not _is_sequence(value):
            shared[parameter.name] = _plain(value, parameter, where)
            continue
        if not parameter.per_model:
            raise PlanError(f"{where}: parameter {parameter.name!r} is {value!r}; there is one for all models")
        if len(value) != models:
            raise PlanError(f"{where}: parameter {parameter.name!r} has {len(value)} values for {models} models")
        for item, one in zip(own, value, strict=True):
            item[parameter.name] = _plain(one, parameter, where)
    return Parameters(shared), tuple(Parameters(item) for item in own)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _plain(value: Any, parameter: Parameter, where: str) -> bool | int | float | str | None:
    """Return a number, boolean or text as Python's own; None counts as not given, as in a recipe."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Real):  # of NumPy
        return float(value)
    raise PlanError(
        f"{where}: parameter {parameter.name!r} is a {type(value).__name__}; it must be a number, true or false"
    )


def _suggest(argument: str, method: Method) -> str:
    names = [parameter.argument for parameter in method.parameters]
    near = difflib.get_close_matches(argument, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names) or 'none'}"
