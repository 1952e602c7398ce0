"""A model is what is there, however it is written; a folder may be called anything."""

import os
from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, llama, name_inputs, plan_of, write_sketch

from mergemill.engine.checkpoint.card import hub_names
from mergemill.engine.errors import PlanError


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "b", "c"):
        write_sketch(tmp_path / name, llama(), config=config())


def stock(base: str, *models: str) -> dict[str, Any]:
    return {"merge_method": "model_stock", "base_model": base, "models": [{"model": model} for model in models]}


def linear(*models: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}}


@pytest.mark.parametrize("spelling", ["base/", "./base", "../{here}/base", "{absolute}", "file://{absolute}", "link"])
@pytest.mark.parametrize("where", ["base", "models"])
def test_one_model_under_two_spellings_is_one_model(spelling: str, where: str, tmp_path: Path) -> None:
    os.symlink(tmp_path / "base", tmp_path / "link")  # noqa: PTH211 -- as a user does
    other = spelling.format(here=tmp_path.name, absolute=tmp_path / "base")
    base, listed = (other, "base") if where == "base" else ("base", other)
    plan, once = plan_of(stock(base, listed, "b", "c")), plan_of(stock("base", "base", "b", "c"))
    assert len(plan.sources) == 3
    assert list(name_inputs(plan).values()) == [
        tuple(each.replace("base:", f"{listed}:", 1) for each in inputs) for inputs in name_inputs(once).values()
    ]
    assert plan.warnings == (f"recipe.yml: {base} is the same model as {listed}",)


def test_copies_of_a_model_are_models_of_their_own() -> None:
    write_sketch(Path("copy"), llama(), config=config())
    plan = plan_of(linear("b", "copy"))
    assert (len(plan.sources), plan.warnings) == (2, ())


def test_a_model_listed_twice_by_two_spellings_is_merged_twice() -> None:
    inputs = next(iter(name_inputs(plan_of(linear("b", "./b", "c"))).values()))
    assert [each.partition(":")[0] for each in inputs] == ["b", "b", "c"]


@pytest.mark.parametrize("name", ["runs/a+b", "runs/c@d", "runs/e@f+g@h"])
def test_a_folder_that_is_there_is_meant_by_its_name(name: str) -> None:
    write_sketch(Path(name), llama(), config=config())
    assert [source.model for source in plan_of(linear(name, "b")).sources] == [name, "b"]
    assert [source.model for source in plan_of(linear({"path": name}, "b")).sources] == [name, "b"]
    assert hub_names([name]) == ()


def test_a_folder_with_a_plus_beside_what_may_be_meant_too_is_refused_with_both_ways_to_write_it() -> None:
    write_sketch(Path("b+c"), llama(), config=config())
    with pytest.raises(PlanError, match=r"\{path: b\+c\}, or the two as \{model: b, lora: c\}"):
        plan_of(linear("b+c", "base"))


def test_slices_and_bases_of_their_own_are_joined_too() -> None:
    sources = [{"model": "./b", "layer_range": [0, 3]}, {"model": "base", "layer_range": [0, 3]}]
    more = {"base_model": "base/", "sources": [*sources, {"model": "c", "layer_range": [0, 3], "delta_base": "b"}]}
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 1}, "slices": [more]}
    assert [source.model for source in plan_of(recipe).sources] == ["./b", "base", "c"]


def test_what_a_recipe_for_mergekit_says_of_its_lists_of_weights_is_not_needed_and_told() -> None:
    given = {"model": "b", "override_architecture": "XForCausalLM"}
    (warning,) = plan_of(linear({"model": "base"} | given, "c")).warnings
    assert (
        warning
        == "recipe.yml: b: override_architecture says nothing here: the names of its tensors are read from its files"
    )
