"""Stages in a recipe: the documents of one file, their names, and what is wrong with them, by file and line."""

import pytest

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import Recipe, load_recipe, parse_recipe, recipe_to_json
from mergemill.engine.recipe.stages import order_stages


def write(name: str | None, *models: str) -> str:
    named = f"name: {name}\n" if name else ""
    return f"{named}merge_method: linear\nmodels: [{', '.join(f'{{model: {model}}}' for model in models)}]\n"


def join(*documents: str) -> str:
    return "---\n".join(documents)


def order(recipe: Recipe) -> list[str | None]:
    return [stage.name for stage in order_stages(recipe, where="recipe.yml")[0]]


@pytest.mark.parametrize("result", [0, 1, 2])
def test_the_document_without_a_name_is_the_result_wherever_it_stands(result: int) -> None:
    documents = [write("a", "x"), write("b", "a")]
    documents.insert(result, write(None, "b"))
    recipe = parse_recipe(join(*documents))
    assert recipe.name is None
    assert order(recipe) == ["a", "b"]


def test_where_all_have_names_the_last_is_the_result() -> None:
    recipe = parse_recipe(join(write("b", "a"), write("a", "x"), write("c", "b")))
    assert recipe.name == "c"
    assert order(recipe) == ["a", "b"]


def test_empty_documents_are_skipped() -> None:
    assert parse_recipe(join("", write("a", "x"), "", write(None, "a"), "")).stages is not None
    assert parse_recipe(join(write(None, "x"), "")).stages is None


def test_a_stage_that_nothing_needs_is_named() -> None:
    recipe = parse_recipe(join(write("a", "x"), write("b", "a"), write("other", "b"), write(None, "a")))
    needed, unused = order_stages(recipe, where="recipe.yml")
    assert ([stage.name for stage in needed], unused) == (["a"], ["b", "other"])


def test_a_mapping_may_hold_its_stages_itself() -> None:
    recipe = parse_recipe(join(write("a", "x"), write(None, "a")))
    assert load_recipe(recipe_to_json(recipe)) == recipe


def test_a_stage_stands_wherever_a_model_may() -> None:
    text = """
merge_method: ties
base_model: a
slices:
  - sources:
      - {model: b, layer_range: [0, 2], delta_base: c}
      - {model: {path: d}, layer_range: [0, 2]}
    base_model: e
"""
    recipe = parse_recipe(join(*(write(name, "x") for name in "abcde"), text))
    assert sorted(str(name) for name in order(recipe)) == list("abcde")


def test_a_path_is_no_stage() -> None:
    recipe = parse_recipe(join(write("a", "x"), write(None, "./a")))
    assert order_stages(recipe, where="recipe.yml") == ([], ["a"])


FAULTS = {
    join(write("a", "x"), write("a", "y"), write(None, "a")): (
        "recipe.yml:5: this document has the name 'a' of the one in line 1; every name stands once"
    ),
    join(write(None, "x"), write("a", "y"), write(None, "a")): (
        "recipe.yml:8: this document has no name, nor has the one in line 1; only the result may have none"
    ),
    join(write("a b", "x"), write(None, "a")): "recipe.yml:1: 'name' must be a name of letters, digits and ._-, ",
    join(write("..", "x"), write(None, "a")): "recipe.yml:1: 'name' must be a name of letters, digits and ._-, ",
    join(write("a", "x"), "stages: [{name: b, merge_method: linear, models: [{model: y}]}]\n" + write(None, "a")): (
        "recipe.yml:5: stages stand as documents of the file, or below the key stages, not both"
    ),
    join(
        write("a", "x"), write(None, "a") + "dtpye: float16\n"
    ): "recipe.yml:7: unknown key 'dtpye'; did you mean 'dtype'?",
}


@pytest.mark.parametrize("text", FAULTS)
def test_what_is_wrong_is_told_with_its_lines(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert str(caught.value).startswith(FAULTS[text])


CIRCLES = {
    join(
        write("a", "b"), write("b", "a"), write(None, "a")
    ): r"recipe.yml: a circle of stages: (a needs b needs a|b needs a needs b); ",
    join(
        write("linear", "linear"), write(None, "linear")
    ): "recipe.yml: a circle of stages: linear needs linear; ./name is",
    join(write("a", "x"), write("b", "a", "b")): "recipe.yml: a circle of stages: b needs b; ",
    join(write("a", "x"), write(None, "a@main")): "recipe.yml: a@main: the stage a has no revisions; leave @main out",
}


@pytest.mark.parametrize("text", CIRCLES)
def test_a_circle_and_a_revision_of_a_stage_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=CIRCLES[text]):
        order_stages(parse_recipe(text), where="recipe.yml")
