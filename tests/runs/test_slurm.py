"""Merges by jobs of a real SLURM on this machine: jobs that are cancelled, and that come when there is work."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import dask
import pytest
from runs.merging import hash_output, is_loadable, plan_merge
from servers.slurm import PARTITION, Slurm

from mergemill.cli.merge import describe_wait
from mergemill.engine import run
from mergemill.engine.errors import ClusterError
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import ClusterFile, parse_cluster
from mergemill.engine.runs.clusters import connect, factories
from mergemill.engine.runs.events import Event, PartFinished, Started, Waiting

MakeCluster = Callable[..., ClusterFile]


@pytest.fixture
def make_cluster(slurm: Slurm, tmp_path: Path) -> MakeCluster:
    """Return the cluster file of some jobs; their logs lie beside the output."""

    def make(workers: str, queue: str = PARTITION, first: str = "sleep 0") -> ClusterFile:
        options = f"{{queue: {queue}, log_directory: {tmp_path / 'jobs'}, local_directory: {tmp_path / 'dask'},"
        options += f" job_script_prologue: [{first}], scheduler_options: {{host: 127.0.0.1}}}}"
        return parse_cluster(f"kind: slurm\nworkers: {workers}\nmemory: 256MiB\noptions: {options}", name="slurm.yml")

    return make


@pytest.fixture
def plan(family: Path) -> Plan:
    """A merge of many small parts."""
    return plan_merge("ties", family)


@pytest.fixture
def expected(plan: Plan, tmp_path: Path) -> dict[str, str]:
    """The bytes of a merge by threads of this process."""
    run(plan, tmp_path / "here", workers=0)
    return hash_output(tmp_path / "here")


def test_two_jobs_write_the_same_bytes_and_are_gone(
    slurm: Slurm, make_cluster: MakeCluster, plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    states: list[list[str]] = []

    def look(event: Event) -> None:
        if isinstance(event, Waiting | Started):
            states.append(list(slurm.list_jobs().values()))

    run(plan, tmp_path / "out", cluster=make_cluster("2"), on_event=look)
    assert hash_output(tmp_path / "out") == expected
    assert [len(each) for each in states] == [2, 2]
    assert "RUNNING" in states[1]
    assert [state for state in slurm.list_jobs().values() if state == "RUNNING"] == []


def test_a_job_that_is_cancelled_half_way_costs_its_parts_only(
    slurm: Slurm, make_cluster: MakeCluster, plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    cancelled: list[str] = []

    def cancel(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done >= len(plan.parts) // 2 and not cancelled:
            cancelled.extend(list(slurm.list_jobs())[:1])
            slurm.call("scancel", *cancelled)

    committed = run(plan, tmp_path / "out", cluster=make_cluster("2"), on_event=cancel)
    assert cancelled
    assert committed.redone_parts == len(plan.parts)
    assert hash_output(tmp_path / "out") == expected


@pytest.mark.slow
def test_when_all_jobs_are_cancelled_others_take_their_place(
    slurm: Slurm,
    make_cluster: MakeCluster,
    plan: Plan,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cancelled: list[str] = []
    seen: set[str] = set()
    monkeypatch.setattr(factories, "REPLACE_S", 1)

    def cancel(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done >= 5 and not cancelled:
            cancelled.extend(slurm.list_jobs())
            slurm.call("scancel", *cancelled)
        elif cancelled:
            seen.update(slurm.list_jobs())

    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        run(plan, tmp_path / "out", cluster=make_cluster("1"), on_event=cancel)
    assert cancelled
    assert seen - {*cancelled}
    assert hash_output(tmp_path / "out") == expected


@pytest.mark.slow
def test_jobs_come_from_none_as_there_is_work(
    slurm: Slurm, make_cluster: MakeCluster, plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    most = 0

    def count(event: Event) -> None:
        nonlocal most
        most = max(most, len(slurm.list_jobs()))

    run(plan, tmp_path / "out", cluster=make_cluster("{minimum: 0, maximum: 2}"), on_event=count)
    assert hash_output(tmp_path / "out") == expected
    assert 1 <= most <= 2


def test_a_queue_that_does_not_exist_is_one_error(make_cluster: MakeCluster, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"SLURMCluster could not be started: .*nvalid partition") as said:
        run(plan, tmp_path / "out", cluster=make_cluster("1", "nowhere"))
    assert "\n" not in str(said.value)
    assert not is_loadable(tmp_path / "out")


def test_a_job_that_runs_and_whose_worker_does_not_come_is_told_of_again(
    make_cluster: MakeCluster, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "TELL_S", 1.5)
    events: list[Event] = []
    run(plan, tmp_path / "out", cluster=make_cluster("1", first="sleep 6"), on_event=events.append)
    waits = [event for event in events if isinstance(event, Waiting)]
    assert waits[0] == Waiting("slurm.yml", 0.0)
    assert len(waits) > 2
    assert all(later.waited_s > wait.waited_s + 1.5 for wait, later in pairwise(waits))
    assert f"slurm.yml: no worker has come for {waits[1].waited_s:.0f} s" in describe_wait(waits[1])
    assert is_loadable(tmp_path / "out")
