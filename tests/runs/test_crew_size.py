"""How many workers a machine is asked for."""

import os
from pathlib import Path

import pytest
from models import write_llama

from mergemill.engine import describe_plan, load_recipe, make_plan
from mergemill.engine.errors import PlanError


def test_more_workers_than_a_machine_has_use_for_are_refused_before_anything_starts(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "a", seed=0, layers=1)
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n")
    plan = make_plan(load_recipe(recipe))
    cores = len(os.sched_getaffinity(0))
    assert describe_plan(plan, workers=4 * cores)["workers"] == 4 * cores
    with pytest.raises(PlanError, match=rf"^--workers {4 * cores + 1}: .* give at most {4 * cores}, or a cluster file"):
        describe_plan(plan, workers=4 * cores + 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_so_are_more_threads(workers: int, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "a", seed=0, layers=1)
    plan = make_plan({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    most = 32 * len(os.sched_getaffinity(0))
    assert describe_plan(plan, workers=workers, threads=most)["threads"] == most
    for threads in (most + 1, 10**20):
        with pytest.raises(PlanError, match=rf"^--threads {threads}: .*; give at most {most}$"):
            describe_plan(plan, workers=workers, threads=threads)
