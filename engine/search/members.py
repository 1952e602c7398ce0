"""Recipes of some of several models: what soups and cocktails judge."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergemill.engine.errors import PlanError
from mergemill.engine.recipe import ModelEntry, Recipe, parse_recipe, recipe_to_json
from mergemill.engine.recipe.templates import Values, write_documents
from mergemill.engine.search.strategies.soup import MODELS


def list_members(recipe: Recipe) -> dict[str, ModelEntry]:
    """Return the models of a recipe that a soup may keep or leave out, which the base is not."""
    if recipe.models is None:
        raise PlanError(f"{recipe.file or 'recipe'}: a soup is made of whole models; list them under 'models'")
    found = {str(entry.model): entry for entry in recipe.models if entry.model != recipe.base_model}
    if len(found) < len([entry for entry in recipe.models if entry.model != recipe.base_model]):
        raise PlanError(f"{recipe.file or 'recipe'}: a model is listed twice; a soup has each once")
    if len(found) < 2:
        raise PlanError(f"{recipe.file or 'recipe'}: a soup needs two models or more; here is {len(found)}")
    return found


def make_members(recipe: Recipe) -> Callable[[Values], Recipe]:
    """Return what gives the recipe with some of its models; of one alone, the model itself."""
    members = list_members(recipe)
    plain = {key: value for key, value in recipe_to_json(recipe).items() if key not in _OF_METHOD}

    def make(values: Values) -> Recipe:
        named = values[MODELS]
        assert isinstance(named, tuple)
        if len(named) == 1:
            return read_back(plain | make_alone(members[str(named[0])].model), recipe.file)
        wanted = {members[str(name)].model for name in named}
        models = [entry for entry in recipe.models or () if entry.model in wanted or entry.model == recipe.base_model]
        return read_back(recipe_to_json(recipe.model_copy(update={"models": tuple(models)})), recipe.file)

    return make


_OF_METHOD = ("merge_method", "base_model", "models", "parameters", "methods", "coefficients", "post")


def make_alone(model: Any) -> dict[str, Any]:
    """Return the recipe whose result is a model itself."""
    return {"merge_method": "passthrough", "models": [{"model": model.model_dump(mode="json")}]}


def read_back(recipe: Mapping[str, Any], file: str) -> Recipe:
    """Return the recipe that a mapping says, with a text that says the same."""
    return parse_recipe(write_documents(_split_stages(recipe)), name=file or "recipe")


def _split_stages(recipe: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return a recipe as the documents of its file: stages are documents of their own."""
    whole = {key: value for key, value in recipe.items() if key != "stages"}
    return [*(recipe.get("stages") or ()), whole]
