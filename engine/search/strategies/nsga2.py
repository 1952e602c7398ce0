"""NSGA-II: the front of several objectives, by the package optuna.

Source: Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002.
"""

import math

from mergemill.engine.search.space import Space
from mergemill.engine.search.strategies.asking import Asking
from mergemill.engine.search.strategies.by_optuna import list_sides, list_starts, load_optuna, to_values

POPULATION = 16


def ask_nsga2(space: Space, seed: int, population: int | None, objectives: int) -> Asking:
    """Ask for generations without an end; the first candidate is the start. A rank is that of each objective."""
    optuna = load_optuna("nsga2")
    sides, size = dict(list_sides(space.variables, optuna.distributions)), population or POPULATION
    sampler = optuna.samplers.NSGAIISampler(population_size=size, seed=seed)
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    study.enqueue_trial(dict(list_starts(space.variables)))
    while True:
        trials = [study.ask(sides) for _ in range(size)]
        ranks = yield [to_values(space.variables, trial.params) for trial in trials]
        for trial, rank in zip(trials, ranks, strict=True):
            if all(map(math.isfinite, rank)):
                study.tell(trial, list(rank))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
