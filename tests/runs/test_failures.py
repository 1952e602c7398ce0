"""What the logs and the errors of tasks call the tensors that they were about."""

from pathlib import Path

import pytest
import torch
from runs.merging import SMALL_PART, make_recipe_of, parts_of
from safetensors.torch import save_file

from mergemill.engine import make_plan
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.graph import make_tasks
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.runs.tasks.failures import WorkersDied, explain_deaths, name_in_key

HOSTILE = "layers.0.\x1b]0;owned\x07\u202e\nforged-round0-" + "x" * 1000
NAMES = (HOSTILE, HOSTILE + "y", name_in_key(HOSTILE), "plain.weight", "back\\slash", "é")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    for model in "ABC":
        (tmp_path / model).mkdir()
        save_file({name: torch.ones(600, 600) for name in NAMES}, tmp_path / model / "model.safetensors")
    models = [{"model": str(tmp_path / model), "parameters": {"weight": 1, "density": 0.5}} for model in "AB"]
    with parts_of(SMALL_PART):
        return make_plan(make_recipe_of({"merge_method": "ties", "base_model": str(tmp_path / "C"), "models": models}))


def list_keys(plan: Plan, out: Path) -> list[str]:
    tasks = make_tasks(plan, plan.parts, find_output(out).targets(plan), token="f" * 20)
    return sorted({str(key) for task in tasks for key in task.__dask_graph__()})


def test_no_key_of_a_task_which_dask_logs_as_it_is_holds_a_control_character(plan: Plan, tmp_path: Path) -> None:
    keys = [key for key in list_keys(plan, tmp_path / "out") if key.startswith(("gather-", "total"))]
    assert any("plain.weight" in key for key in keys)
    assert all(key.isprintable() and len(key) < 400 for key in keys)


def test_every_tensor_has_keys_of_its_own(plan: Plan, tmp_path: Path) -> None:
    assert len({name_in_key(name) for name in NAMES}) == len(NAMES)
    firsts = [key for key in list_keys(plan, tmp_path / "out") if key.startswith("gather-") and "-round0-f" in key]
    pieces = sum(not piece.whole for part in plan.parts for piece in part.pieces)
    assert len(firsts) == pieces > 2 * len(NAMES)


def test_workers_that_die_of_any_task_are_told_by_the_tensor_that_it_was_about(plan: Plan, tmp_path: Path) -> None:
    for key in list_keys(plan, tmp_path / "out"):
        if key.startswith(("gather-", "total", "merge-")):
            said = str(explain_deaths(WorkersDied(key, 3), plan))
            assert any(said.startswith(name) for name in NAMES)
