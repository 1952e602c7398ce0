"""Tree-structured Parzen estimators, by the package optuna: for boxes with choices among their sides.

Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NIPS 2011. One candidate is asked for at a time,
since each hangs on those before it.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mergemill.engine.errors import InputError
from mergemill.engine.recipe.searches import Variable
from mergemill.engine.recipe.templates import Values
from mergemill.engine.search.space import Space, round_value
from mergemill.engine.search.strategies.asking import Asking


def ask_tpe(space: Space, seed: int) -> Asking:
    """Ask for one candidate after the other, without an end; the first is the start."""
    optuna = load_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sides = dict(_list_sides(space.variables, optuna.distributions))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict(_list_starts(space.variables)))
    while True:
        trial = study.ask(sides)
        (rank,) = yield [_to_values(space.variables, trial.params)]
        if math.isfinite(rank):
            study.tell(trial, rank)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)


def load_optuna() -> Any:
    """Return the package; `InputError` where it is missing."""
    try:
        import optuna
    except ImportError:
        raise InputError("strategy tpe needs the package optuna: pip install mergemill[tpe]") from None
    return optuna


def _list_sides(variables: Mapping[str, Variable], kinds: Any) -> Iterator[tuple[str, Any]]:
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


def _list_starts(variables: Mapping[str, Variable]) -> Iterator[tuple[str, float]]:
    """Yield each number that has a start of its own."""
    for name, variable in variables.items():
        if variable.start is not None:
            start = int(variable.start) if variable.integer else variable.start
            yield from ((_name(name, place), start) for place in range(variable.layers or 1))


def _to_values(variables: Mapping[str, Variable], found: Mapping[str, Any]) -> Values:
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
