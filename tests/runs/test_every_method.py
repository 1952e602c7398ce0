"""Every method there is, over files: threads, processes, slabs and the cut into parts do not show in the bytes."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from runs.merging import SMALL_PART, hash_output, parts_of

from mergemill.engine import make_plan, run
from mergemill.engine.methods import find_methods
from mergemill.engine.methods.contract import Method
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.runs import running
from mergemill.engine.runs.clusters.cluster import Cluster, open_cluster
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.tensors.slabs import BLOCK

METHODS = tuple(find_methods())
LARGE_PART = 1 << 30
WORKERS = Workers(2, 1, 512 << 20)

SETTINGS: dict[str, Any] = {"weight": 0.6, "t": 0.01, "density": 0.6, "epsilon": 0.1, "gamma": 0.1, "select_topk": 0.4}
"""What tells something where the default does not; a method takes those that it knows."""
SPECIAL: dict[str, dict[str, Any]] = {
    "ram": {"epsilon": 0.001},
    "ramplus_tl": {"epsilon": 0.001},
    "slerp": {"t": 0.3},
    "passthrough": {"scale": 0.5},
    "model_stock": {"filter_wise": True},
    "nuslerp": {"nuslerp_flatten": False},
}


@pytest.fixture(scope="module")
def processes() -> Iterator[Cluster]:
    """A real cluster of two worker processes, kept for all methods."""
    with open_cluster(WORKERS) as cluster:
        yield cluster


def plan_method(method: Method, folder: Path, *, part_bytes: int) -> Plan:
    """Plan a merge of as many models as the method takes, at most the base, A and B."""
    names = ["A", "B"][: 1 if method.base == "first of two" else method.most_inputs or 2]
    known = {parameter.name for parameter in method.parameters}
    value: dict[str, Any] = {
        "merge_method": method.name,
        "models": [{"model": str(folder / name)} for name in names],
        "parameters": {key: value for key, value in SETTINGS.items() if key in known} | SPECIAL.get(method.name, {}),
    }
    if method.base in ("required", "optional", "first of two"):
        value["base_model"] = str(folder / "base")
    with parts_of(part_bytes):
        return make_plan(parse_recipe(json.dumps(value)))


@pytest.mark.parametrize("name", METHODS)
def test_threads_processes_slabs_and_parts_give_the_same_bytes(
    name: str, family: Path, tmp_path: Path, processes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = find_methods()[name]
    whole = plan_method(method, family, part_bytes=LARGE_PART)
    cut = plan_method(method, family, part_bytes=SMALL_PART)
    assert len(whole.parts) == 1 < len(cut.parts)
    run(whole, tmp_path / "one thread", workers=0, threads=1)
    run(whole, tmp_path / "small slabs", workers=0, threads=1, slab=BLOCK)
    run(cut, tmp_path / "four threads, small parts", workers=0, threads=4)
    monkeypatch.setattr(running, "open_crew", lambda wanted, *more: nullcontext(processes))
    committed = run(cut, tmp_path / "two processes", workers=WORKERS.processes, threads=1, memory=WORKERS.memory_bytes)
    assert committed.redone_parts == len(cut.parts)
    expected = hash_output(tmp_path / "one thread")
    assert {
        name: hash_output(tmp_path / name) == expected for name in ("small slabs", "four threads, small parts")
    } == {
        "small slabs": True,
        "four threads, small parts": True,
    }
    assert hash_output(tmp_path / "two processes") == expected
