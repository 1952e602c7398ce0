"""Objectives: what is measured of a candidate."""

from collections.abc import Callable
from dataclasses import dataclass

from mergemill.engine.recipe.searches import COMMAND_S, Objective
from mergemill.engine.search.candidate import OpenCandidate
from mergemill.engine.search.command import list_places, run_command


@dataclass(frozen=True, slots=True)
class Judged:
    """What an objective says of a candidate."""

    score: float
    stderr: float | None = None
    parts: tuple[float, ...] = ()
    """Of a sum: the score of each of its items."""


Judge = Callable[[OpenCandidate], Judged]


def make_judge(objective: Objective, where: str) -> Judge:
    """Return what measures an objective; `InputError` where it cannot be measured."""
    if objective.sum is not None:
        return _make_sum(objective, where)
    assert objective.command is not None
    return _make_command(objective.command, objective.seconds or COMMAND_S, where)


def _make_command(command: str, limit_s: float, where: str) -> Judge:
    places = list_places(command, where)

    def judge(candidate: OpenCandidate) -> Judged:
        makers = {"model": candidate.make_model, "recipe": candidate.make_recipe, "values": candidate.write_values}
        given = {place: makers[place]() for place in sorted(places)}
        return Judged(run_command(command, given, limit_s))

    return judge


def _make_sum(objective: Objective, where: str) -> Judge:
    items = [(each.weight, each.sign, make_judge(each, where)) for each in objective.sum or ()]

    def judge(candidate: OpenCandidate) -> Judged:
        """Add the items so that less is better, or more where the sum says so; their errors as if independent."""
        found = [each(candidate) for _, _, each in items]
        factors = [objective.sign * sign * weight for weight, sign, _ in items]
        score = sum(factor * each.score for factor, each in zip(factors, found, strict=True))
        known = [(factor, each.stderr) for factor, each in zip(factors, found, strict=True) if each.stderr is not None]
        stderr = sum((factor * error) ** 2 for factor, error in known) ** 0.5 if known else None
        return Judged(score, stderr, tuple(each.score for each in found))

    return judge
