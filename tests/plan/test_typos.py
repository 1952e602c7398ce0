"""What is misspelt in a recipe is an error at its line, all of it at once; the near name is told."""

from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, llama, write_sketch

from mergemill.engine import make_plan, make_raw_plan
from mergemill.engine.errors import Absent, PlanError, RecipeError

RECIPE = """merge_method: ties
base_model: base
models:
  - model: a
    parameters: {densty: 0.5, wieght: 0.3}
  - model: b
    parameters: {Density: 0.4, weight: 1}
"""


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        write_sketch(tmp_path / name, llama(), config=config())


def write(text: str) -> Path:
    path = Path("recipe.yml")
    path.write_text(text)
    return path


@pytest.mark.parametrize("plan", [make_plan, make_raw_plan])
def test_misspelt_parameters_are_errors_each_at_its_line(plan: Any) -> None:
    with pytest.raises(PlanError) as caught:
        plan(write(RECIPE))
    assert str(caught.value) == ("recipe.yml:5: ties takes no parameter 'densty'; did you mean 'density'? (and 2 more)")
    assert [(fault.line, fault.text[fault.column :][: fault.width]) for fault in caught.value.faults] == [
        (5, "densty"),
        (5, "wieght"),
        (7, "Density"),
    ]


def test_of_a_mapping_the_message_has_all_that_there_is_to_say() -> None:
    models = [{"model": "a", "parameters": {"wieght": 1}}, {"model": "b", "parameters": {"weight": 1}}]
    with pytest.raises(PlanError, match="linear takes no parameter 'wieght'; did you mean 'weight'"):
        make_plan({"merge_method": "linear", "models": models})


def test_a_parameter_of_another_method_does_nothing_and_is_told() -> None:
    text = RECIPE.replace("densty", "density").replace("wieght: 0.3", "weight: 1, epsilon: 0.1").replace("Den", "den")
    (warning,) = make_plan(write(text)).warnings
    assert "ties takes no parameter 'epsilon'" in warning


def test_a_misspelt_method_is_told_at_its_line() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(write(RECIPE.replace("ties", "tiess")))
    assert str(caught.value) == "recipe.yml:1: unknown merge_method 'tiess'; did you mean 'ties'?"
    assert [(fault.line, fault.text) for fault in caught.value.faults] == [(1, "merge_method: tiess")]


def test_all_faults_of_a_recipe_are_told_in_the_order_of_its_lines() -> None:
    text = RECIPE.replace("parameters: {D", "parameter: {D") + "dtype: bfloat61\n"
    with pytest.raises(RecipeError) as caught:
        make_plan(write(text))
    assert [(fault.line, fault.words) for fault in caught.value.faults] == [
        (7, "unknown key 'parameter'; did you mean 'parameters'?"),
        (8, "'dtype' is 'bfloat61', an unknown dtype; did you mean 'bfloat16'?"),
    ]


def test_a_folder_beside_the_one_that_was_given_is_told() -> None:
    with pytest.raises(Absent, match=r"bsae: no such file or folder; did you mean base\?"):
        make_plan({"merge_method": "passthrough", "models": [{"model": "bsae"}]})


@pytest.mark.parametrize(
    "line", ["storage_options: {s3: {secret: HUSH}}", "base_modle: s3://me:HUSH@bucket/a", "bse_model: {token: HUSH}"]
)
def test_a_line_that_may_hold_a_secret_is_not_repeated(line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_plan(write(RECIPE + line + "\n"))
    assert "HUSH" not in str(caught.value)
    assert not any("HUSH" in fault.text + fault.words for fault in caught.value.faults)
