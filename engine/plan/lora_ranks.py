"""Ranks from singular values: by a share of the energy, by a ratio, by a threshold, or by a budget for all modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.extraction import Extraction
from mergemill.engine.plan.sizes import format_size


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found of a tensor before it is planned."""

    changed: bool
    values: Sequence[Sequence[float]] = ()  # singular values of each matrix, largest first, where ranks hang on them


def choose_rank(measured: Measured, most: int, asked: Extraction) -> int:
    """Return the rank of a tensor's matrices, at most `most`; of several matrices the largest that one needs."""
    return max((_choose(values, most, asked) for values in measured.values), default=most)


def _choose(values: Sequence[float], most: int, asked: Extraction) -> int:
    """Return the rank of one matrix.

    >>> from dataclasses import replace
    >>> asked = Extraction(model="a", base_model="b")
    >>> values = [4.0, 2.0, 1.0, 0.0]
    >>> [_choose(values, 3, each) for each in (
    ...     asked, replace(asked, energy=0.95), replace(asked, sv_ratio=0.5), replace(asked, sv_epsilon=3.0))]
    [3, 2, 2, 1]
    """
    rank = min(most, len(values))
    if asked.sv_epsilon:
        rank = min(rank, sum(value > asked.sv_epsilon for value in values))
    if asked.sv_ratio is not None:
        rank = min(rank, sum(value >= asked.sv_ratio * values[0] for value in values))
    if asked.energy is not None:
        total, kept = sum(value * value for value in values), 0.0
        for number, value in enumerate(values[:rank], 1):
            kept += value * value
            if kept >= asked.energy * total:
                return number
    return rank


def spend(
    values: Mapping[str, Sequence[Sequence[float]]],
    most: Mapping[str, int],
    costs: Mapping[str, int],
    budget_bytes: int,
) -> Mapping[str, int]:
    """Return the rank of each tensor, at most its own `most`, so that all cost no more and the least is lost.

    costs: bytes of one more rank. What each rank gains falls with the rank, so taking the best gain for its cost first
    is right, but for the last ones that no longer fit. A rank is one of all matrices of a tensor.

    >>> spend({"a": [[3.0, 1.0]], "b": [[2.0, 1.9]]}, {"a": 2, "b": 2}, {"a": 1, "b": 1}, 3)
    {'a': 1, 'b': 2}
    """
    gains = [
        (sum(each[number] ** 2 for each in of if number < len(each)) / costs[name], name, number)
        for name, of in values.items()
        for number in range(most[name])
    ]
    ranks, left, full = dict.fromkeys(values, 0), budget_bytes, set[str]()
    for gain, name, number in sorted(gains, key=lambda each: (-each[0], each[1], each[2])):
        if gain <= 0 or name in full or ranks[name] != number:
            continue
        if costs[name] > left:
            full.add(name)
            continue
        ranks[name], left = number + 1, left - costs[name]
    return ranks


def check_budget(budget_bytes: int, whole_bytes: int) -> int:
    """Return what is left of a budget for factors; `PlanError` where tensors that are stored whole need more."""
    if whole_bytes >= budget_bytes:
        raise PlanError(
            f"--budget {format_size(budget_bytes)} is too little: {format_size(whole_bytes)} are tensors that are "
            f"stored whole; decompose them with --embed-lora, or leave them out with -e or --skip-undecomposable"
        )
    return budget_bytes - whole_bytes
