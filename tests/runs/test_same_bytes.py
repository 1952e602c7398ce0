"""The same recipe gives the same bytes, whatever runs it and however it is cut."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from runs.merging import ISSUE_METHODS, METHODS, SMALL_PART, hash_output, plan_merge, same_tensors

from mergemill.engine import run
from mergemill.engine.plan.memory import stream_bytes, task_bytes
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs import running
from mergemill.engine.runs.clusters.cluster import Cluster, open_cluster
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.tensors.slabs import BLOCK, SLAB

LARGE_PART = 1 << 30


@pytest.fixture(scope="module", params=[1, 4])
def processes(request: pytest.FixtureRequest) -> Iterator[tuple[Workers, Cluster]]:
    """A real cluster of worker processes, kept for all methods."""
    workers = Workers(request.param, 1, 256 << 20)
    with open_cluster(workers) as cluster:
        yield workers, cluster


def merge_alone(plan: Plan, out: Path) -> dict[str, str]:
    """Run in one thread with all the memory it can use, and return the files' hashes."""
    run(plan, out, workers=0, threads=1)
    return hash_output(out)


def least_memory(plan: Plan) -> int:
    return max(stream_bytes(part) for part in plan.parts)


@pytest.mark.parametrize("method", METHODS)
def test_the_plans_compared_here_differ_in_their_cut(method: str, family: Path) -> None:
    cut, whole = plan_merge(method, family), plan_merge(method, family, part_bytes=LARGE_PART)
    assert len(whole.parts) == 1
    assert len(cut.parts) > 20
    assert any(not piece.whole for part in cut.parts for piece in part.pieces)
    assert cut.digest != whole.digest


@pytest.mark.parametrize("method", METHODS)
def test_threads_slabs_memory_and_part_sizes_give_the_same_bytes(method: str, family: Path, tmp_path: Path) -> None:
    whole = plan_merge(method, family, part_bytes=LARGE_PART)
    expected = merge_alone(whole, tmp_path / "expected")
    assert len(expected) > 5
    cut = plan_merge(method, family)
    middle = plan_merge(method, family, part_bytes=3 * SMALL_PART)
    runs = {
        "four threads": (cut, {"threads": 4}),
        "one thread": (cut, {"threads": 1}),
        "small slabs": (whole, {"threads": 1, "slab": BLOCK}),
        "small slabs of cut tensors": (middle, {"threads": 2, "slab": BLOCK}),
        "large slabs of cut tensors": (middle, {"threads": 2, "slab": SLAB}),
        "little memory": (whole, {"threads": 1, "memory": least_memory(whole)}),
        "little memory for many threads": (middle, {"threads": 4, "memory": least_memory(middle)}),
    }
    for name, (plan, options) in runs.items():
        out = tmp_path / name
        run(plan, out, workers=0, **options)
        assert hash_output(out) == expected, name


@pytest.mark.parametrize("method", ISSUE_METHODS)
def test_one_and_four_processes_give_the_bytes_of_one_thread(
    method: str, family: Path, tmp_path: Path, processes: tuple[Workers, Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, cluster = processes

    def lend_cluster(wanted: Workers, *more: object) -> AbstractContextManager[Cluster]:
        assert wanted == workers
        return nullcontext(cluster)

    plan = plan_merge(method, family)
    expected = merge_alone(plan, tmp_path / "expected")
    monkeypatch.setattr(running, "open_crew", lend_cluster)
    committed = run(plan, tmp_path / "out", workers=workers.processes, threads=1, memory=workers.memory_bytes)
    assert committed.redone_parts == len(plan.parts)
    assert hash_output(tmp_path / "out") == expected


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_little_memory_reads_inputs_again_and_much_memory_keeps_them(method: str, family: Path, tmp_path: Path) -> None:
    plan = plan_merge(method, family, part_bytes=LARGE_PART)
    least = least_memory(plan)
    assert max(task_bytes(part, 1 << 30) for part in plan.parts) > least
    little = run(plan, tmp_path / "little", workers=0, threads=1, memory=least)
    much = run(plan, tmp_path / "much", workers=0, threads=1)
    assert much.read_bytes == plan.read_bytes
    assert little.read_bytes > much.read_bytes


@pytest.mark.parametrize("method", ISSUE_METHODS)
def test_shards_of_any_size_hold_the_same_tensors(method: str, family: Path, tmp_path: Path) -> None:
    one = plan_merge(method, family)
    several = plan_merge(method, family, shard_size="700KB")
    single = plan_merge(method, family, shard_size="tensor")
    assert len(one.shards) == 1 < len(several.shards) < len(single.shards) == single.tensors
    for name, plan in {"one": one, "several": several, "single": single}.items():
        run(plan, tmp_path / name, workers=0, threads=2)
    assert same_tensors(tmp_path / "one", tmp_path / "several")
    assert same_tensors(tmp_path / "one", tmp_path / "single")


def test_another_seed_gives_other_masks(family: Path, tmp_path: Path) -> None:
    first = merge_alone(plan_merge("dare_ties", family), tmp_path / "first")
    other = merge_alone(plan_merge("dare_ties", family, seed=1), tmp_path / "other")
    assert first["model-00001-of-00001.safetensors"] != other["model-00001-of-00001.safetensors"]


def test_the_methods_give_different_bytes(family: Path, tmp_path: Path) -> None:
    """Guards the suite: were the models equal, every cut would agree by itself."""
    outs = {
        method: merge_alone(plan_merge(method, family, part_bytes=LARGE_PART), tmp_path / method)
        for method in ("linear", "slerp", "dare_ties")
    }
    assert len({files["model-00001-of-00001.safetensors"] for files in outs.values()}) == 3
