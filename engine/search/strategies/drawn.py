"""Candidates that do not hang on scores: all of a grid, or points that are drawn.

Sobol's points are scrambled ones of torch, which every merge has; SciPy, whose they might be, would be one more.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from mergemill.engine.recipe.searches import Variable
from mergemill.engine.recipe.settings import Scalar
from mergemill.engine.recipe.templates import Values
from mergemill.engine.search.space import Space, to_value
from mergemill.engine.search.strategies.asking import Asking

TOGETHER = 8  # candidates of a generation


def ask_grid(space: Space, steps: int | None) -> Asking:
    """Ask for all combinations of values; those of the first variable change last."""
    axes = [list(_list_items(each, steps)) for each in space.variables.values()]
    combined = (dict(zip(space.variables, each, strict=True)) for each in itertools.product(*axes))
    yield from _ask_all(combined)
    return "grid"


def ask_random(space: Space, seed: int) -> Asking:
    """Ask for points of the box at random, the start first."""
    draw = random.Random(seed)
    drawn = (space.to_values([draw.random() for _ in range(space.size)]) for _ in itertools.count())
    yield from _ask_all(itertools.chain([space.to_values(space.start)], drawn))
    return "random"


def ask_sobol(space: Space, seed: int) -> Asking:
    """Ask for points of a scrambled Sobol sequence, which fills the box evenly."""
    from mergemill.engine.tensors.lazy import torch

    engine = torch.quasirandom.SobolEngine(space.size, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    drawn = (space.to_values(engine.draw(1)[0].tolist()) for _ in itertools.count())
    yield from _ask_all(drawn)
    return "sobol"


def _ask_all(candidates: Iterator[Values]) -> Asking:
    while generation := list(itertools.islice(candidates, TOGETHER)):
        yield generation
    return ""


def _list_items(variable: Variable, steps: int | None) -> Iterator[Scalar | tuple[Scalar, ...]]:
    """Yield the values of a variable in a grid, of one that has layers all combinations of theirs."""
    if variable.choices is not None:
        yield from variable.choices
        return
    assert steps is not None
    single = list(dict.fromkeys(to_value(variable, x) for x in _spread(steps)))
    if variable.layers is None:
        yield from single
    else:
        yield from itertools.product(single, repeat=variable.layers)


def _spread(steps: int) -> Sequence[float]:
    return [place / (steps - 1) for place in range(steps)]
