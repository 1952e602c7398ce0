"""CMA-ES in the unit box, by the package cmaes.

Source: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772; its separable form, Ros and Hansen 2008;
whole numbers with a margin, Hamano et al., arXiv:2205.13482. The first candidate is the start itself, so that what
comes out is never worse. A generation has as many candidates whatever workers there are (2026-11-29): else the table of
a search would hang on the machine.
"""

from typing import Any

import numpy as np

from mergemill.engine.errors import InputError
from mergemill.engine.search.space import Space
from mergemill.engine.search.strategies.asking import Asking

SEPARABLE = 40  # numbers, above which only the variances are learnt
SIGMA = 0.3
LEAST_SIGMA = 1e-3
WORST = 1e300  # for what failed: cmaes takes differences of its values


def ask_cma(space: Space, seed: int, population: int | None, sigma: float | None) -> Asking:
    """Ask for generations until the step is less than a thousandth of the box."""
    optimizer = _make_optimizer(space, seed, population, sigma or SIGMA)
    first = True
    while _read_sigma(optimizer) >= LEAST_SIGMA:
        drawn = [_ask(optimizer) for _ in range(optimizer.population_size)]
        if first:
            drawn[0] = (np.array(space.start), np.array(space.start))
        first = False
        ranks = yield [space.to_values(point.tolist()) for point, _ in drawn]
        optimizer.tell([(told, min(rank, WORST)) for (_, told), rank in zip(drawn, ranks, strict=True)])
    return "sigma"


def _make_optimizer(space: Space, seed: int, population: int | None, sigma: float) -> Any:
    cmaes = load_cmaes()
    bounds = np.tile([0.0, 1.0], (space.size, 1))
    given = {"mean": np.array(space.start), "sigma": sigma, "bounds": bounds, "seed": seed}
    if population is not None:
        given["population_size"] = population
    if any(space.steps):
        return cmaes.CMAwM(steps=np.array(space.steps), **given)
    return cmaes.SepCMA(**given) if space.size > SEPARABLE else cmaes.CMA(**given)


def load_cmaes() -> Any:
    """Return the package; `InputError` where it is missing."""
    try:
        import cmaes
    except ImportError:
        raise InputError("strategy cma needs the package cmaes: pip install mergemill[search]") from None
    return cmaes


def _ask(optimizer: Any) -> tuple[Any, Any]:
    """Return a point, and what the optimizer is told of it: with whole numbers they differ."""
    point = optimizer.ask()
    return point if isinstance(point, tuple) else (point, point)


def _read_sigma(optimizer: Any) -> float:
    return float(getattr(optimizer, "_sigma", None) or optimizer._cma._sigma)
