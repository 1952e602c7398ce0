"""Variables as the package optuna has them: each number, or choice, by a name of its own."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergemill.engine.errors import InputError
from mergemill.engine.recipe.searches import Variable
from mergemill.engine.recipe.templates import Values
from mergemill.engine.search.space import round_value


def load_optuna(strategy: str) -> Any:
    """Return the package, silent; `InputError` where it is missing."""
    try:
        import optuna
    except ImportError:
        raise InputError(f"strategy {strategy} needs the package optuna: pip install mergemill[tpe]") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def list_sides(variables: Mapping[str, Variable], kinds: Any) -> Iterator[tuple[str, Any]]:
    """Yield each number, or choice, with where it may lie."""
    for name, variable in variables.items():
        for place in range(variable.layers or 1):
            if variable.choices is not None:
                yield _name(name, place), kinds.CategoricalDistribution(list(range(len(variable.choices))))
            elif variable.integer:
                low, high = int(variable.low or 0), int(variable.high or 0)
                yield _name(name, place), kinds.IntDistribution(low, high, log=variable.log)
            else:
                yield _name(name, place), kinds.FloatDistribution(variable.low, variable.high, log=variable.log)


def list_starts(variables: Mapping[str, Variable]) -> Iterator[tuple[str, float]]:
    """Yield each number that has a start of its own."""
    for name, variable in variables.items():
        if variable.start is not None:
            start = int(variable.start) if variable.integer else variable.start
            yield from ((_name(name, place), start) for place in range(variable.layers or 1))


def to_values(variables: Mapping[str, Variable], found: Mapping[str, Any]) -> Values:
    """Return the values of what optuna calls the parameters of a trial."""
    values = {}
    for name, variable in variables.items():
        items = tuple(_to_value(variable, found[_name(name, place)]) for place in range(variable.layers or 1))
        values[name] = items if variable.layers else items[0]
    return values


def _to_value(variable: Variable, found: Any) -> Any:
    if variable.choices is not None:
        return variable.choices[found]
    return int(found) if variable.integer else round_value(float(found))


def _name(name: str, place: int) -> str:
    return f"{name}[{place}]"
