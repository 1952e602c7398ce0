"""The front of several objectives: the candidates than which none is better in one without being worse in another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergemill.engine.search.trials import Trial


@dataclass(frozen=True, slots=True)
class SumItem:
    """One of the objectives of a sum."""

    name: str
    sign: int
    """-1 where more is better, else 1."""


def rank_items(trial: Trial, items: Sequence[SumItem]) -> tuple[float, ...]:
    """Return of each item what is less for a better trial; a failed one ranks last in all."""
    if trial.score is None:
        return (math.inf,) * len(items)
    return tuple(item.sign * part for item, part in zip(items, trial.parts, strict=True))


def find_front(trials: Sequence[Trial], items: Sequence[SumItem]) -> list[Trial]:
    """Return the trials of the front in the order of the first item; of equal ones the first alone."""
    if len(items) < 2:
        return []
    ranked = sorted((rank_items(trial, items), trial.number, trial) for trial in trials if trial.score is not None)
    front: list[tuple[tuple[float, ...], Trial]] = []
    for ranks, _, trial in ranked:
        if not any(all(x <= y for x, y in zip(other, ranks, strict=True)) for other, _ in front):
            front.append((ranks, trial))
    return [trial for _, trial in front]
