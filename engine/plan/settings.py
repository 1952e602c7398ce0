"""Settings: which value a method's parameter has for one tensor and one model.

Precedence, the first that gives a value: the source (for a parameter per model), the slice, the module, the
recipe, the method's default. A list of conditions of which none matches gives none.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mergemill.engine.errors import PlanError
from mergemill.engine.methods.catalogue import find_methods
from mergemill.engine.methods.contract import Method, Parameter, say_number
from mergemill.engine.methods.own import MethodsFile, get_any_method
from mergemill.engine.recipe import Condition, Parameters, Recipe, Setting
from mergemill.engine.recipe.excerpts import find_keys

_SET_IT = "set it beside the model, or under 'parameters'"
_HARMLESS = {"int8_mask"}  # published recipes of sparse methods carry it; masks are never stored here


class Site(NamedTuple):
    """Where settings are looked up for one output tensor."""

    tensor: str  # the name that filters match: the output's, or beside a model that model's
    t: float  # place in the slice's layers: 0 the first, 1 the last; 0 outside the layers
    scopes: tuple[Parameters, ...]  # slice, module, recipe: the nearest first
    depth: float = 0.0  # place in all the output's layers: 0 before and in the first, 1 in the last and after them


def resolve_settings(
    method: Method, site: Site, models: Sequence[tuple[str, str, Parameters]], *, where: str
) -> Mapping[str, Any]:
    """Return the method's settings for one tensor; `models` are the inputs' names, their tensors' and own parameters.

    A filter beside a model matches the name of that model's tensor, one in shared settings that of the output's: they
    differ where slices move layers, and so mergekit reads them. A parameter per model is a tuple with one value for
    each of `models`. Raises `PlanError` for a missing value or one out of its range.
    """
    shared = [parameter for parameter in method.parameters if not parameter.per_model]
    settings: dict[str, Any] = {
        parameter.name: tuple(
            _resolve(parameter, site, site.scopes, f" of model {model}", where, own=(tensor, own))
            for model, tensor, own in models
        )
        for parameter in method.parameters
        if parameter.per_model
    }
    settings.update(resolve_shared(shared, site, where=where))
    arguments = {parameter.argument: settings[parameter.name] for parameter in method.parameters}
    _check_together(method, site, arguments, where)
    return settings


def resolve_shared(parameters: Sequence[Parameter], site: Site, *, where: str, hint: str = _SET_IT) -> dict[str, Any]:
    """Return the values of parameters that all models share; `PlanError` as `resolve_settings`."""
    return {parameter.name: _resolve(parameter, site, site.scopes, "", where, hint) for parameter in parameters}


def _check_together(method: Method, site: Site, arguments: Mapping[str, Any], where: str) -> None:
    if method.check is None:
        return
    wanted = {name: arguments[name] for name in method.check.__annotations__ if name in arguments}
    if fault := method.check(**wanted):
        raise PlanError(f"{where}: tensor {site.tensor}: {fault}")


def _resolve(
    parameter: Parameter,
    site: Site,
    scopes: Sequence[Parameters],
    of: str,
    where: str,
    hint: str = _SET_IT,
    own: tuple[str, Parameters] | None = None,
) -> Any:
    named = () if own is None else (own,)
    for tensor, scope in (*named, *((site.tensor, scope) for scope in scopes)):
        setting = scope.get(parameter.name)
        here = site if tensor == site.tensor or not isinstance(setting, tuple) else site._replace(tensor=tensor)
        value = evaluate(setting, here)
        if value is not None:
            return _check(parameter, value, f"{where}: parameter {parameter.name!r}{of} for tensor {site.tensor}")
    if parameter.required:
        raise PlanError(f"{where}: parameter {parameter.name!r}{of} has no value for tensor {site.tensor}; {hint}")
    return parameter.default


def evaluate(setting: Setting | None, site: Site) -> Any:
    """Return a setting's value at `site`; None where no condition matches.

    >>> evaluate((0.0, 1.0, 0.0), Site("x", 0.25, ()))
    0.5
    """
    if not isinstance(setting, tuple):
        return setting
    if isinstance(setting[0], Condition):
        matching = (item.value for item in setting if isinstance(item, Condition) and item.matches(site.tensor))
        return evaluate(next(matching, None), site)
    return _interpolate(setting, site.t)


def has_gradient(setting: Setting) -> bool:
    """Whether a setting, or one of its conditions, is a value that changes over the layers."""
    if not isinstance(setting, tuple):
        return False
    return not isinstance(setting[0], Condition) or any(
        isinstance(item, Condition) and isinstance(item.value, tuple) for item in setting
    )


def _interpolate(gradient: Sequence[Any], t: float) -> Any:
    at = t * (len(gradient) - 1)
    left = min(math.floor(at), len(gradient) - 1)
    right = min(left + 1, len(gradient) - 1)
    if isinstance(gradient[left], bool | str):
        return gradient[left]
    share = at - left
    return (1 - share) * gradient[left] + share * gradient[right]


def _check(parameter: Parameter, value: Any, where: str) -> Any:
    if parameter.kind is bool:
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        raise PlanError(f"{where} is {value!r}; it must be true or false")
    if isinstance(value, bool) or (number := _parse_number(value)) is None:
        raise PlanError(f"{where} is {value!r}; it must be a number")
    value = number
    if parameter.kind is int and value != int(value):
        raise PlanError(f"{where} is {value!r}; it must be a whole number")
    if parameter.within is not None and not parameter.within.holds(value):
        raise PlanError(f"{where} is {say_number(value)}; it must be {parameter.within}")
    return parameter.kind(value)


def _parse_number(value: float | str) -> float | None:
    """Return a finite number, also one that the recipe has in quotes, as mergekit takes it."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def warn_of_residuals(recipe: Recipe, *, where: str) -> list[str]:
    """Return a warning where a slice has a `residual_weight`, which mergekit takes and ignores."""
    modules = [module.slices for module in (recipe.modules or {}).values()]
    slices = [part for parts in (recipe.slices, *modules) for part in parts or ()]
    if all(part.residual_weight is None for part in slices):
        return []
    return [f"{where}: residual_weight of a slice does nothing, here as in mergekit"]


def choose_method(recipe: Recipe, code: Sequence[MethodsFile]) -> Method:
    """Return the method that a recipe names; `PlanError` where there is none, with the line that names it."""
    try:
        return get_any_method(recipe.merge_method, code)
    except PlanError as error:
        keys = find_keys(recipe.text, {"merge_method": str(error)})
        faults = tuple(fault for fault in keys if recipe.merge_method in fault.text)
        place = f"{recipe.file}:{faults[0].line}: " if faults and recipe.file else ""
        raise PlanError(f"{place}{error}", faults[:1]) from None


def check_names(method: Method, scopes: Iterable[Parameters], recipe: Recipe, *, where: str) -> None:
    """Raise `PlanError` for parameters that are nearly those of the method: a misspelt one would do nothing in silence.

    Case and ``-`` do not count. What is a parameter of another method is only told (`warn_of_unused`).
    """
    known = [parameter.name for parameter in method.parameters]
    given = dict.fromkeys(name for scope in scopes for name in scope if name not in {*known, *_HARMLESS})
    near = {name: found for name in given if (found := _find_near(name, known)) is not None}
    others = {parameter.name for each in find_methods().values() for parameter in each.parameters} if near else set()
    words = {
        name: f"{method.name} takes no parameter {name!r}; did you mean {found!r}?"
        for name, found in near.items()
        if name not in others
    }
    if words:
        faults = find_keys(recipe.text, words)
        place = f"{recipe.file}:{faults[0].line}" if faults and recipe.file else where
        more = f" (and {len(words) - 1} more)" if len(words) > 1 else ""
        raise PlanError(f"{place}: {faults[0].words if faults else next(iter(words.values()))}{more}", faults)


def _find_near(name: str, known: Sequence[str]) -> str | None:
    folded = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(folded, known, n=1, cutoff=0.7)), None)


def warn_of_unused(method: Method, shared: Sequence[Parameters], own: Sequence[Parameters], *, where: str) -> list[str]:
    """Return a warning for each parameter that is set somewhere and does nothing there.

    shared: the settings of slices, modules and the recipe; own: those beside a model.
    """
    known = {parameter.name for parameter in method.parameters}
    if "density" in known:
        known |= _HARMLESS
    beside = {name for scope in own for name in scope}
    unused = sorted(({name for scope in shared for name in scope} | beside) - known)
    general = sorted(beside & {parameter.name for parameter in method.parameters if not parameter.per_model})
    return [
        *(f"{where}: {method.name} takes no parameter {name!r}; it does nothing here" for name in unused),
        *(
            f"{where}: {method.name} has one {name!r} for all models; beside a model it does nothing"
            for name in general
        ),
    ]
