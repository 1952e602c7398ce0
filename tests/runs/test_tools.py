"""A tool is a planner that returns a draft: it runs on any cluster, resumes, verifies and replays like a merge."""

import json
from pathlib import Path

import pytest
from plan.toy_tool import STEPS, plan_tower
from runs.merging import SMALL_PART, hash_output, make_recipe_of, parts_of, run_until, same_tensors, write_family

from mergemill.engine import make_plan, run, verify
from mergemill.engine.errors import OutputError, VerifyError
from mergemill.engine.plan import planners
from mergemill.engine.plan.values import Origin, Plan
from mergemill.engine.runs.abort import abort
from mergemill.engine.runs.status import status


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def whole(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tower makes where no tensor is cut."""
    out = tmp_path_factory.mktemp("tower") / "out"
    run(plan(family, part_bytes=1 << 30), out, workers=0)
    return out


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planners.PLANNERS, "tower", plan_tower)


def plan(family: Path, part_bytes: int = SMALL_PART) -> Plan:
    models = {"base": str(family / "base"), "a": str(family / "A"), "b": str(family / "B")}
    with parts_of(part_bytes):
        return plan_tower(Origin("tower", "a tower", models), 1 << 20)


def test_three_steps_in_one_tree_give_the_bytes_of_three_merges_after_each_other(
    family: Path, whole: Path, tmp_path: Path
) -> None:
    base, a, b = (str(family / name) for name in ("base", "A", "B"))
    first, second, third = (str(tmp_path / name) for name in ("ties", "slerp", "linear"))
    ties, slerp, linear = STEPS.values()
    per_model = [{key: ties[key][i] for key in ("weight", "density")} for i in range(2)]
    recipes = {
        first: {
            "base_model": base,
            "models": [{"model": model, "parameters": own} for model, own in zip((a, b), per_model, strict=True)],
            "parameters": {key: ties[key] for key in ("normalize", "lambda", "rescale")},
        },
        second: {"base_model": base, "models": [{"model": base}, {"model": first}], "parameters": slerp},
        third: {
            "models": [
                {"model": model, "parameters": {"weight": weight}}
                for model, weight in zip((second, b), linear["weight"], strict=True)
            ],
        },
    }
    for (out, recipe), method in zip(recipes.items(), STEPS, strict=True):
        run(make_plan(make_recipe_of({"merge_method": method, "dtype": "float32", **recipe})), out, workers=0)
    assert same_tensors(Path(third), whole)


def test_a_tool_gives_the_same_bytes_cut_on_two_processes_and_resumed(
    family: Path, whole: Path, tmp_path: Path
) -> None:
    cut = plan(family)
    assert len(cut.parts) > 2 * len(plan(family, part_bytes=1 << 30).parts)
    run(cut, tmp_path / "processes", workers=2)
    assert hash_output(tmp_path / "processes") == hash_output(whole)
    run_until(cut, tmp_path / "resumed", 7)
    done = run(cut, tmp_path / "resumed", workers=0)
    assert done.redone_parts == len(cut.parts) - 7
    assert hash_output(tmp_path / "resumed") == hash_output(whole)


def test_a_tool_is_verified_replayed_and_told_of(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)  # a finished output keeps no absolute path
    out, asked = tmp_path / "out", plan(Path(), part_bytes=1 << 30)
    run(asked, out, workers=0)
    assert verify(out, replay=3).replayed == 3
    assert status(out).state == "finished"
    assert "a tower" in repr(asked)
    (out / "config.json").write_text("{}")
    with pytest.raises(VerifyError, match=r"config.json: changed since it was written"):
        verify(out)


def test_a_tool_that_this_version_does_not_know_is_checked_and_not_replayed(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(plan(family, part_bytes=1 << 30), out, workers=0)
    monkeypatch.delitem(planners.PLANNERS, "tower")
    assert verify(out).parts
    with pytest.raises(OutputError, match="made by 'tower', which this version of mergemill does not know"):
        verify(out, replay=1)


def test_what_a_tool_left_unfinished_is_aborted(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(plan(family), out, 3)
    assert json.loads((out / ".mergemill" / "plan.json").read_text())["kind"] == "tower"
    abort(out)
    assert not out.exists()
