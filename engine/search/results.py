"""What a search found: its trials, the best first, and the recipe of each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergemill.engine.errors import InputError, OutputError
from mergemill.engine.recipe import ModelRef, load_recipe
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.recipe.templates import (
    parse_template,
)
from mergemill.engine.search.cocktails import read_alone
from mergemill.engine.search.front import find_front
from mergemill.engine.search.judge import list_items
from mergemill.engine.search.members import make_members
from mergemill.engine.search.report import sort_trials
from mergemill.engine.search.state import read_state
from mergemill.engine.search.trials import Trial, read_trials
from mergemill.engine.storage.urls import parse_path


def read_results(folder: str | Path) -> list[Trial]:
    """Return the trials of a search, the best first; `OutputError` where the folder holds none."""
    place = parse_path(folder, OutputError, what="a search")
    sign = _find_sign(read_state(place)["search"])
    return sort_trials(list(read_trials(place).values()), sign)


def read_front(folder: str | Path) -> list[int]:
    """Return the numbers of the trials of a sum's front, in the order of its first item; of others nothing."""
    place = parse_path(folder, OutputError, what="a search")
    said = read_state(place)["search"].get("objective") or {}
    items = list_items(Objective.model_validate(said)) if said.get("sum") else []
    return [trial.number for trial in find_front(list(read_trials(place).values()), items)]


def _find_sign(search: Mapping[str, Any]) -> int:
    objective = search.get("objective") or search.get("soup") or search.get("cocktail") or {}
    return -1 if objective.get("direction") == "max" else 1


def make_candidate(folder: str | Path, number: int) -> str:
    """Return the whole recipe of a candidate of a search, as YAML."""
    place = parse_path(folder, OutputError, what="a search")
    state, trial = read_state(place), read_trials(place).get(number)
    if trial is None:
        raise InputError(f"{place}: has no candidate {number}; mergemill results lists them")
    if not isinstance(state["search"].get("objective"), dict):
        return _make_member(state, trial)
    return parse_template(state["recipe"], name=f"{place}: the recipe").fill(trial.values).text


def _make_member(state: Mapping[str, Any], trial: Trial) -> str:
    """Return the recipe of some of the models of a soup or a cocktail."""
    if "cocktail" in state["search"]:
        refs = {model: ModelRef.model_validate(model) for model in state["search"]["models"]}
        return read_alone(refs, trial.values).text
    return make_members(load_recipe(state["recipe"] + "\n\n"))(trial.values).text
