"""Cocktails: models with weights from their losses, merged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from mergemill.engine.errors import PlanError, RunError
from mergemill.engine.recipe import ModelRef, Recipe, parse_reference
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.recipe.searches import Budget, SearchFile
from mergemill.engine.recipe.templates import (
    Values,
)
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.runs.running import run_as
from mergemill.engine.search.cocktail import ALPHA, TEMPERATURE, find_weights, make_cocktail
from mergemill.engine.search.drive import Found, OnTrial, drive_search, ignore
from mergemill.engine.search.members import make_alone, read_back
from mergemill.engine.search.searching import digest_texts, judging, make_hunt, plan_candidate
from mergemill.engine.search.state import SearchRecord, find_beside, held, list_sources, open_state
from mergemill.engine.search.strategies.alone import ask_alone
from mergemill.engine.search.strategies.soup import MODELS


@dataclass(frozen=True, slots=True)
class Cocktail:
    """What came of a cocktail, in the order in which the models were given."""

    losses: tuple[float, ...]
    weights: tuple[float, ...]
    """Of the models among each other; a target takes its share beside."""
    found: Found


def run_cocktail(
    models: Sequence[str],
    out: str | Path,
    objective: Objective,
    *,
    temperature: float = TEMPERATURE,
    target: str | None = None,
    alpha: float = ALPHA,
    on_trial: OnTrial = ignore,
    **options: Unpack[RunKeywords],
) -> Cocktail:
    """Merge models with weights from their losses into the folder `out`; what is known meanwhile is in ``out.search``.

    objective: the loss, of each model alone. temperature: the lower, the more the best counts. target: a model that
    gets the share `alpha`, whatever its loss. Raises as `run_search`.
    """
    if len(set(models)) < max(2, len(models)):
        raise PlanError(f"a cocktail needs two models or more, each once; here are: {', '.join(models)}")
    if temperature <= 0 or not 0 <= alpha <= 1:
        raise PlanError(f"temperature is {temperature:g} and must be above 0; alpha is {alpha:g}, of 0 to 1")
    asked, refs = RunOptions(**options), {model: parse_reference(model) for model in models}
    aim = parse_reference(target) if target else None
    file = SearchFile.model_construct(objective=objective, budget=Budget(), holdout=None, name="cocktail")
    hunt = make_hunt(file, lambda values: read_alone(refs, values), "A cocktail: each model alone")
    shares = [1 / len(models)] * len(models)
    plan = plan_candidate(read_back(make_cocktail(list(refs.values()), shares, aim, alpha), ""), asked)
    said = {"cocktail": objective.model_dump(mode="json", exclude_none=True), "models": list(models)}
    record = SearchRecord(said, "", list_sources(plan.pins), digest_texts([objective]))
    place = find_beside(out)
    with held(place), judging(hunt, plan, asked) as hunt:
        open_state(place, record)
        found = drive_search(hunt, ask_alone(list(models)), place, asked, on_trial)
        for model, trial in zip(models, found.trials, strict=True):
            if trial.score is None:
                raise RunError(f"{place}: the loss of {model} is not known: {trial.error}")
        losses = [_find_loss(objective, trial.score) for trial in found.trials if trial.score is not None]
        weights = find_weights(losses, temperature)
        merged = read_back(make_cocktail(list(refs.values()), weights, aim, alpha), "")
        run_as(plan_candidate(merged, asked), out, asked)
    return Cocktail(tuple(losses), tuple(weights), found)


def _find_loss(objective: Objective, score: float) -> float:
    """Return the loss that a score says: of a perplexity its logarithm."""
    return math.log(score) if objective.perplexity is not None else objective.sign * score


def read_alone(refs: Mapping[str, ModelRef], values: Values) -> Recipe:
    named = values[MODELS]
    assert isinstance(named, tuple)
    return read_back(make_alone(refs[str(named[0])]), "")
