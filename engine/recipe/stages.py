"""Stages: merges whose results are models of other merges, as the documents of one file.

A stage's name stands for its result wherever a model may stand, and comes before a folder or a repository of that name;
``./name`` is the folder.
"""

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.mixtures import AnyRecipe
from mergemill.engine.recipe.references import ModelRef
from mergemill.engine.storage.same import holds_place
from mergemill.engine.storage.urls import parse_place


def join_documents(recipes: Sequence[AnyRecipe], lines: Sequence[int], *, name: str) -> AnyRecipe:
    """Return the result of a file's documents with the others as its stages; `lines` are where they begin.

    The result is the one without a name, or the last.
    """
    if len(recipes) == 1:
        return recipes[0]
    first: dict[str | None, int] = {}
    for recipe, line in zip(recipes, lines, strict=True):
        if recipe.stages is not None:
            raise RecipeError(
                f"{name}:{line}: stages stand as documents of the file, or below the key stages, not both"
            )
        if recipe.name in first:
            twice = f"has the name {recipe.name!r} of" if recipe.name else "has no name, nor has"
            hint = "every name stands once" if recipe.name else "only the result may have none"
            raise RecipeError(f"{name}:{line}: this document {twice} the one in line {first[recipe.name]}; {hint}")
        first[recipe.name] = line
    result = next((recipe for recipe in recipes if recipe.name is None), recipes[-1])
    return result.model_copy(update={"stages": tuple(recipe for recipe in recipes if recipe is not result)})


def order_stages(recipe: AnyRecipe, *, where: str) -> tuple[list[AnyRecipe], list[str]]:
    """Return the stages that the result needs, each after those that it needs, and the names of the others."""
    stages: dict[str, AnyRecipe] = {str(stage.name): stage for stage in recipe.stages or ()}
    for stage in recipe.stages or ():
        if stage.name is None or stage.stages is not None:
            raise RecipeError(f"{where}: a stage needs a name, and has no stages of its own")
    if len(stages) < len(recipe.stages or ()) or recipe.name in stages:
        raise RecipeError(f"{where}: two stages have one name; every name stands once")
    result = recipe.name or ""
    known: dict[str, AnyRecipe] = {**stages, result: recipe}
    waiting, needed = [result], dict[str, set[str]]()
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = {
                ref.path for ref in list_models(known[name]).values() if names_stage(ref, known, where=where)
            }
            waiting += needed[name]
    try:
        order = list(TopologicalSorter(needed).static_order())
    except CycleError as error:
        circle = " needs ".join(reversed(error.args[1]))
        raise RecipeError(f"{where}: a circle of stages: {circle}; ./name is a folder") from None
    return [stages[name] for name in order if name != result], [name for name in stages if name not in needed]


def list_kept(recipe: AnyRecipe, folder: str | None = None) -> list[tuple[str, AnyRecipe]]:
    """Return the stages that are to be written too: where each goes, and the recipe of which it is the result.

    folder: where all of them go, below their names, which do not say it themselves. `RecipeError` for two in one place,
    or one inside of another's, however the places are written.
    """
    where, stages = recipe.file or "recipe", recipe.stages or ()
    _check_result(recipe, where)
    kept: dict[str, AnyRecipe] = {}
    for stage in stages:
        place = stage.keep or (f"{folder.rstrip('/')}/{stage.name}" if folder else None)
        if place is None:
            continue
        for other, there in kept.items():
            _check_apart((place, str(stage.name)), (other, str(there.name)), where)
        alone = stage.model_copy(update={"keep": None, "file": recipe.file, "round_stages": recipe.round_stages})
        others = tuple(each.model_copy(update={"keep": None}) for each in stages if each is not stage)
        needed, _ = order_stages(alone.model_copy(update={"stages": others or None}), where=where)
        kept[place] = alone.model_copy(update={"stages": tuple(needed) or None})
    return list(kept.items())


def _check_apart(this: tuple[str, str], other: tuple[str, str], where: str) -> None:
    """Raise `RecipeError` unless two stages, each its place and its name, are kept apart from each other."""
    places = [parse_place(place, RecipeError) for place, _ in (this, other)]
    if holds_place(*places) and holds_place(*reversed(places)):
        written = this[0] if this[0] == other[0] else f"{other[0]}, which is {this[0]}"
        raise RecipeError(f"{where}: the stages {other[1]} and {this[1]} are both kept in {written}")
    for (outer, outer_name), (inner, inner_name) in ((this, other), (other, this)):
        if holds_place(parse_place(outer, RecipeError), parse_place(inner, RecipeError)):
            raise RecipeError(
                f"{where}: the stage {inner_name} is kept in {inner}, which lies in {outer}, where {outer_name} "
                "is kept; keep each in a folder of its own"
            )


def keep_nothing(recipe: AnyRecipe) -> AnyRecipe:
    """Return a recipe without what its stages say of where they are written too: its result does not hang on that."""
    _check_result(recipe, recipe.file or "recipe")
    if all(stage.keep is None for stage in recipe.stages or ()):
        return recipe
    stages = tuple(stage.model_copy(update={"keep": None}) for stage in recipe.stages or ())
    return recipe.model_copy(update={"stages": stages})


def _check_result(recipe: AnyRecipe, where: str) -> None:
    if recipe.keep is not None:
        raise RecipeError(f"{where}: keep is for a stage, which nothing else writes; where the result goes is OUT")


def names_stage(ref: ModelRef, stages: Mapping[str, object], *, where: str) -> bool:
    """Whether a reference means one of the stages; `RecipeError` for a revision of one."""
    if not ref.path or ref.path not in stages:
        return False
    if ref.revision is not None:
        raise RecipeError(f"{where}: {ref}: the stage {ref.path} has no revisions; leave @{ref.revision} out")
    return True


def count_uses(name: str, recipes: Sequence[AnyRecipe]) -> int:
    """Return how often a stage is named by recipes as a model."""
    return sum(ref.path == name for recipe in recipes for ref in list_models(recipe).values())


def list_models(recipe: AnyRecipe) -> Mapping[str, ModelRef]:
    """Return the recipe's models by their references as text, in its order; an unlisted base model follows them."""
    return {str(ref): ref for ref in recipe.refs}


def list_methods(recipe: AnyRecipe) -> list[str]:
    """Return the names of the files of methods that a recipe and its stages run."""
    return list(dict.fromkeys(name for each in (recipe, *(recipe.stages or ())) for name in each.methods or ()))
