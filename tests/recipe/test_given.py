"""The ways in which a recipe is given: a path, a mapping, YAML text, or a value."""

from pathlib import Path
from types import MappingProxyType

import pytest
from models import write_llama

from mergemill.engine import load_recipe, make_plan, verify
from mergemill.engine import merge as merge_models
from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import parse_recipe

TEXT = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.00001}}\n- {model: b}\n"
MAPPING = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1e-5}}, {"model": "b"}]}


def test_text_mapping_path_and_value_are_one_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(TEXT)
    wanted = parse_recipe(TEXT)
    flow = "{merge_method: linear, models: [{model: a, parameters: {weight: 1e-5}}, {model: b}]}"
    assert {load_recipe(given) for given in (TEXT, flow, str(path), path, wanted)} == {wanted}
    assert load_recipe(MAPPING) == wanted


def test_a_mapping_may_hold_paths_tuples_and_other_mappings() -> None:
    given = MappingProxyType(
        {"merge_method": "linear", "models": ({"model": Path("a")}, MappingProxyType({"model": "b"}))}
    )
    assert [str(entry.model) for entry in load_recipe(given).models or ()] == ["a", "b"]


def test_what_looks_like_another_type_stays_text_in_a_mapping() -> None:
    given = {"merge_method": "linear", "models": [{"model": "1e-5"}, {"model": "no"}, {"model": "2026-11-29"}]}
    assert [str(entry.model) for entry in load_recipe(given).models or ()] == ["1e-5", "no", "2026-11-29"]


def test_the_text_of_a_mapping_is_the_same_recipe() -> None:
    recipe = load_recipe(MAPPING)
    assert parse_recipe(recipe.text) == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (MAPPING | {"dtpye": "float16"}, "recipe: unknown key 'dtpye'; did you mean 'dtype'?"),
        (
            {"merge_method": "linear", "models": [{"model": "a"}, {"modle": "b"}]},
            "recipe: models[1]: unknown key 'modle'; did you mean 'model'?",
        ),
        (
            MAPPING | {"dtype": {1, 2}},
            "recipe: cannot be written as YAML: {1, 2} is no text, number, boolean, list or mapping",
        ),
        (TEXT + "dtpye: float16\n", "recipe:5: unknown key 'dtpye'; did you mean 'dtype'?"),
        (42, "a recipe is a path, a mapping or YAML text, not the number 42"),
    ],
)
def test_a_fault_is_told_where_it_is(given: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(given)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_mapping_that_holds_itself_is_refused() -> None:
    given: dict[str, object] = {"merge_method": "linear"}
    given["models"] = [given]
    with pytest.raises(RecipeError, match="cannot be written as YAML"):
        load_recipe(given)


def test_a_mapping_is_planned_merged_and_replayed(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_llama(tmp_path / name, seed=seed, layers=1)
    given = {
        "merge_method": "linear",
        "models": [{"model": tmp_path / name} for name in "ab"],
        "parameters": {"weight": 1},
    }
    done = merge_models(given, tmp_path / "out", workers=0)
    assert done.digest == make_plan(given).digest
    assert verify(tmp_path / "out", replay=1).replayed == 1
