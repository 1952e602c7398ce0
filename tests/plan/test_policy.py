"""Tensors that are not merged: copied from one model, or left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors, write_llama, write_tensors
from runs.merging import make_recipe_of

from mergemill.engine import make_plan, run
from mergemill.engine.errors import PlanError, RecipeError
from mergemill.engine.plan.values import Plan


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base with a vision tower, a fine-tune of both, and one of its language model alone."""
    tower = {f"visual.blocks.{i}.mlp.weight": torch.full((8, 8), float(i + 1)) for i in range(3)}
    for seed, name in ((1, "base"), (2, "both"), (3, "text")):
        near = None if name == "base" else tmp_path / "base"
        write_llama(tmp_path / name, seed=seed, layers=2, near=near)
        tensors = read_tensors(tmp_path / name)
        if name != "text":
            tensors |= {key: value * seed for key, value in tower.items()}
            tensors["visual.merger.weight"] = torch.full((4, 4), float(seed))
        if name == "both":
            tensors["v_head.summary.weight"] = torch.ones(1, 64)
        write_tensors(tmp_path / name, tensors)
    return tmp_path


def plan_of(folder: Path, names: str, *rules: dict[str, Any], method: str = "task_arithmetic") -> Plan:
    body = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in names.split()],
        "parameters": {"weight": 0.5},
        **({"policy": list(rules)} if rules else {}),
    }
    return make_plan(make_recipe_of(body))


def test_a_tower_is_kept_while_the_language_model_is_merged(models: Path, tmp_path: Path) -> None:
    plan = plan_of(models, "text", {"filter": "visual.", "action": "copy"})
    run(plan, tmp_path / "out", workers=0)
    made, base = read_tensors(tmp_path / "out"), read_tensors(models / "base")
    assert made.keys() == base.keys()
    assert all(torch.equal(made[name], base[name]) == name.startswith("visual.") for name in base)


def test_a_tower_is_copied_from_the_model_that_is_named(models: Path, tmp_path: Path) -> None:
    copied = {"filter": "visual.", "action": "copy", "model": str(models / "both")}
    plan = plan_of(models, "text both", copied, {"filter": "v_head", "action": "drop"})
    run(plan, tmp_path / "out", workers=0)
    made, both = read_tensors(tmp_path / "out"), read_tensors(models / "both")
    assert all(torch.equal(made[name], both[name]) for name in made if name.startswith("visual."))
    assert made.keys() == both.keys() - {"v_head.summary.weight"}
    dropped = {source.model: dict(source.dropped) for source in plan.sources}
    assert dropped[str(models / "both")] == {"left out by policy": 1}
    assert dropped[str(models / "base")] == {"copied from another model by policy": 4}


def test_a_head_that_one_model_has_is_dropped_or_copied(models: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"v_head\.summary\.weight is in .*both but not in"):
        plan_of(models, "both")
    copied = {"filter": "v_head", "action": "copy", "model": str(models / "both")}
    for rule, there in (({"filter": "v_head", "action": "drop"}, False), (copied, True)):
        run(plan_of(models, "both", rule), tmp_path / str(there), workers=0)
        assert ("v_head.summary.weight" in read_tensors(tmp_path / str(there))) == there


def test_the_first_policy_that_matches_holds(models: Path, tmp_path: Path) -> None:
    rules = ({"filter": "visual.blocks.1", "action": "merge"}, {"filter": "re:^v", "action": "drop"})
    run(plan_of(models, "both", *rules), tmp_path / "out", workers=0)
    made = read_tensors(tmp_path / "out")
    assert [name for name in made if name.startswith("v")] == ["visual.blocks.1.mlp.weight"]
    assert made["visual.blocks.1.mlp.weight"][0, 0] == 2 * (1 + 0.5 * (2 - 1))


def test_a_model_that_lacks_a_tower_is_still_refused_without_a_policy(models: Path) -> None:
    with pytest.raises(PlanError, match=r"visual\.blocks"):
        plan_of(models, "text")


def test_a_copy_of_nothing_is_refused(models: Path) -> None:
    with pytest.raises(PlanError, match="which has none in its place"):
        plan_of(models, "both", {"filter": "v_head", "action": "copy"})


def test_a_copy_of_a_model_that_is_not_merged_is_refused(models: Path) -> None:
    with pytest.raises(PlanError, match="none of the recipe's models"):
        plan_of(models, "both", {"filter": "v_head", "action": "copy", "model": "org/other"})


def test_a_filter_that_matches_nothing_is_told(models: Path) -> None:
    rules = ({"filter": "v_head", "action": "drop"}, {"filter": "visuals.", "action": "drop"})
    (told,) = [warning for warning in plan_of(models, "both", *rules).warnings if "policy" in warning]
    assert "'visuals.' matches no tensor" in told


def test_a_policy_casts_as_the_recipe_says(models: Path, tmp_path: Path) -> None:
    body = {"merge_method": "linear", "models": [{"model": str(models / "base")}], "parameters": {"weight": 1}}
    rule = {"filter": "visual", "action": "copy"}
    run(make_plan(make_recipe_of({**body, "policy": [rule], "dtype": "float16"})), tmp_path / "out", workers=0)
    assert read_tensors(tmp_path / "out")["visual.merger.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"filter": "x", "action": "keep"}, "must be one of merge, copy, drop"),
        ({"filter": "x"}, "needs the key 'action'"),
        ({"filter": "re:(", "action": "drop"}, "regular expression"),
        ({"filter": "x", "action": "drop", "model": "a"}, "of copy alone"),
    ],
)
def test_what_is_no_policy_is_refused(rule: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make_recipe_of({"merge_method": "linear", "models": [{"model": "a"}], "policy": [rule]})
