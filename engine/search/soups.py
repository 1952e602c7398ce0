"""Greedy soups: which of several models are better together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from mergemill.engine.recipe import GivenRecipe, load_recipe, recipe_to_json
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.recipe.searches import Budget, SearchFile
from mergemill.engine.recipe.templates import (
    write_documents,
)
from mergemill.engine.runs.options import RunKeywords, RunOptions
from mergemill.engine.runs.running import run_as
from mergemill.engine.search.drive import Found, OnTrial, drive_search, ignore
from mergemill.engine.search.members import list_members, make_members
from mergemill.engine.search.searching import digest_texts, judging, make_hunt, plan_candidate
from mergemill.engine.search.state import SearchRecord, find_beside, held, list_sources, open_state
from mergemill.engine.search.strategies.soup import MODELS, ask_soup, order_models
from mergemill.engine.search.trials import rank


@dataclass(frozen=True, slots=True)
class Soup:
    """What came of a greedy soup."""

    order: tuple[str, ...]
    """The models, the best first."""
    kept: tuple[str, ...]
    """Those that are in it, in the order of their coming."""
    scores: tuple[float | None, ...]
    """Of the best model, then of each soup that was tried."""
    found: Found


def run_soup(
    recipe: GivenRecipe,
    out: str | Path,
    objective: Objective,
    *,
    rounds: int = 1,
    on_trial: OnTrial = ignore,
    **options: Unpack[RunKeywords],
) -> Soup:
    """Merge the greedy soup of a recipe's models into the folder `out`; what is known meanwhile is in ``out.search``.

    objective: what is measured, of each model alone and of each soup. rounds: how often the models that were left out
    are tried. The recipe's method merges them; raises as `run_search`.
    """
    whole, asked = load_recipe(recipe), RunOptions(**options)
    members, make = list(list_members(whole)), make_members(whole)
    file = SearchFile.model_construct(objective=objective, budget=Budget(), holdout=None)
    hunt = make_hunt(file.model_copy(update={"name": whole.file or "recipe"}), make, "A greedy soup")
    plans = [plan_candidate(make({MODELS: tuple(members)}), asked)]
    said = {"soup": objective.model_dump(mode="json", exclude_none=True), "rounds": rounds}
    record = SearchRecord(
        said, write_documents([recipe_to_json(whole)]), list_sources(plans[0].pins), digest_texts([objective])
    )
    place, kept = find_beside(out), list[str]()
    with held(place), judging(hunt, plans[0], asked) as hunt:
        open_state(place, record)
        found = drive_search(hunt, ask_soup(members, rounds, kept), place, asked, on_trial)
        ranks = [rank(trial, hunt.sign) for trial in found.trials[: len(members)]]
        run_as(plan_candidate(make({MODELS: tuple(kept)}), asked), out, asked)
    order = order_models(members, ranks)
    first = found.trials[members.index(order[0])].score
    return Soup(tuple(order), tuple(kept), (first, *(trial.score for trial in found.trials[len(members) :])), found)
