"""Tree-structured Parzen estimators, by the package optuna: for boxes with choices among their sides.

Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NIPS 2011. One candidate is asked for at a time,
since each hangs on those before it.
"""

import math

from mergemill.engine.search.space import Space
from mergemill.engine.search.strategies.asking import Asking
from mergemill.engine.search.strategies.by_optuna import list_sides, list_starts, load_optuna, to_values


def ask_tpe(space: Space, seed: int) -> Asking:
    """Ask for one candidate after the other, without an end; the first is the start."""
    optuna = load_optuna("tpe")
    sides = dict(list_sides(space.variables, optuna.distributions))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict(list_starts(space.variables)))
    while True:
        trial = study.ask(sides)
        (rank,) = yield [to_values(space.variables, trial.params)]
        if math.isfinite(rank):
            study.tell(trial, rank)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
