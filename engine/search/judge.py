"""Objectives: what is measured of a candidate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergemill.engine.evaluation.evaluating import TextSource
from mergemill.engine.recipe.harness import HarnessObjective
from mergemill.engine.recipe.objectives import COMMAND_S, ExamplesObjective, Objective, TextObjective
from mergemill.engine.search.candidate import OpenCandidate
from mergemill.engine.search.command import list_places, run_command
from mergemill.engine.search.front import SumItem
from mergemill.engine.search.harness import check_lm_eval, run_lm_eval


@dataclass(frozen=True, slots=True)
class Judged:
    """What an objective says of a candidate."""

    score: float
    stderr: float | None = None
    parts: tuple[float, ...] = ()
    """Of a sum: the score of each of its items."""
    perplexity: float | None = None
    """Of an entropy, which is low for a model that is sure and wrong: the perplexity of the same text."""


Judge = Callable[[OpenCandidate], Judged]


def list_sources(objectives: Sequence[Objective | None]) -> list[TextSource]:
    """Return the texts that candidates are judged on, each once."""
    each = [objective for objective in objectives if objective is not None]
    flat = [item for objective in each for item in (objective, *(objective.sum or ()))]
    return list(dict.fromkeys(source for item in flat if (source := _find_source(item)) is not None))


def list_items(objective: Objective) -> list[SumItem]:
    """Return the items of a sum, named for people; of any other objective nothing."""
    return [SumItem(_name(each), each.sign) for each in objective.sum or ()]


def _name(objective: Objective) -> str:
    """Return what an objective measures, and on what.

    >>> _name(Objective(command="python score.py {model}")), _name(Objective(entropy={"text": "a/held.txt"}))
    ('python score.py {model}', 'entropy of held.txt')
    """
    if objective.command is not None:
        return objective.command
    if objective.lm_eval is not None:
        return ", ".join(each.task for each in objective.lm_eval.tasks)
    kind = next(key for key in ("perplexity", "entropy", "few_shot") if getattr(objective, key))
    return f"{'loss' if kind == 'few_shot' else kind} of {Path(objective.files[0]).name}"


def make_judge(objective: Objective, where: str) -> Judge:
    """Return what measures an objective; `InputError` where it cannot be measured."""
    if objective.sum is not None:
        return _make_sum(objective, where)
    if objective.command is not None:
        return _make_command(objective.command, objective.seconds or COMMAND_S, where)
    if objective.lm_eval is not None:
        return _make_harness(objective.lm_eval, objective.seconds or COMMAND_S, where)
    source = _find_source(objective)
    assert source is not None
    return _make_text(objective, source)


def _find_source(objective: Objective) -> TextSource | None:
    found: TextObjective | ExamplesObjective | None = objective.perplexity or objective.entropy or objective.few_shot
    if isinstance(found, TextObjective):
        return TextSource(text=found.text, window=found.window, stride=found.stride, windows=found.windows)
    return None if found is None else TextSource(examples=found.examples)


def _make_text(objective: Objective, source: TextSource) -> Judge:
    def judge(candidate: OpenCandidate) -> Judged:
        found = candidate.evaluate(source)
        if objective.perplexity is not None:
            return Judged(found.perplexity, found.stderr)
        if objective.entropy is not None:
            return Judged(found.entropy, found.entropy_stderr, perplexity=found.perplexity)
        return Judged(found.nll, found.stderr)

    return judge


def _make_command(command: str, limit_s: float, where: str) -> Judge:
    places = list_places(command, where)

    def judge(candidate: OpenCandidate) -> Judged:
        makers = {"model": candidate.make_model, "recipe": candidate.make_recipe, "values": candidate.write_values}
        given = {place: makers[place]() for place in sorted(places)}
        return Judged(run_command(command, given, limit_s))

    return judge


def _make_harness(objective: HarnessObjective, limit_s: float, where: str) -> Judge:
    check_lm_eval(objective, where)

    def judge(candidate: OpenCandidate) -> Judged:
        score, stderr, parts = run_lm_eval(objective, candidate.make_model(), limit_s)
        return Judged(score, stderr, parts if len(parts) > 1 else ())

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
