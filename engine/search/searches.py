"""Searching for a merge, by name: for the command line and for programs."""

from mergemill.engine.evaluation.evaluating import TextSource
from mergemill.engine.evaluation.sums import Evaluation
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.recipe.searches import load_search
from mergemill.engine.recipe.sweeps import make_sweep
from mergemill.engine.search.cocktail import ALPHA, TEMPERATURE, TEMPERATURES, find_weights
from mergemill.engine.search.cocktails import Cocktail, run_cocktail
from mergemill.engine.search.drive import Found, TrialFinished
from mergemill.engine.search.report import say_number, say_score
from mergemill.engine.search.results import make_candidate, read_front, read_results
from mergemill.engine.search.searching import run_search
from mergemill.engine.search.soups import Soup, run_soup
from mergemill.engine.search.trials import Trial

__all__ = [
    "ALPHA",
    "TEMPERATURE",
    "TEMPERATURES",
    "Cocktail",
    "Evaluation",
    "Found",
    "Objective",
    "Soup",
    "TextSource",
    "Trial",
    "TrialFinished",
    "find_weights",
    "load_search",
    "make_candidate",
    "make_sweep",
    "read_front",
    "read_results",
    "run_cocktail",
    "run_search",
    "run_soup",
    "say_number",
    "say_score",
]
