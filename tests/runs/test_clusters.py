"""Merges on clusters that mergemill starts itself, from a cluster file; `test_slurm.py` has those of a real queue."""

from pathlib import Path

import psutil
import pytest
from runs.merging import hash_output, plan_merge

from mergemill.engine import describe_plan, run
from mergemill.engine.errors import ClusterError, InputError, PlanError
from mergemill.engine.recipe import ClusterFile, parse_cluster
from mergemill.engine.runs.events import Event, Started, Waiting
from mergemill.engine.runs.worker.options import WorkerOptions
from mergemill.engine.runs.worker.workers import choose_workers
from mergemill.engine.storage.store import make_storage


def make_local(workers: str, more: str = "") -> ClusterFile:
    return parse_cluster(f"kind: local\nworkers: {workers}\nmemory: 256MiB\n{more}", name="mine.yml")


def test_a_cluster_file_of_processes_writes_the_same_bytes(family: Path, tmp_path: Path) -> None:
    plan = plan_merge("ties", family)
    run(plan, tmp_path / "here", workers=0)
    events: list[Event] = []
    run(plan, tmp_path / "out", cluster=make_local("2", "threads: 2\n"), on_event=events.append)
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")
    assert events[0] == Waiting("mine.yml")
    assert isinstance(events[1], Started)
    assert (events[1].workers, events[1].threads, events[1].memory_bytes) == (2, 2, 256 << 20)
    assert events[1].warnings == ()


def test_workers_come_from_none_as_there_is_work(family: Path, tmp_path: Path) -> None:
    plan = plan_merge("dare_ties", family)
    run(plan, tmp_path / "here", workers=0)
    run(plan, tmp_path / "out", cluster=make_local("{minimum: 0, maximum: 2}"))
    assert hash_output(tmp_path / "out") == hash_output(tmp_path / "here")


def test_the_cluster_ends_with_an_error_of_the_caller(family: Path, tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))

    def stop(event: Event) -> None:
        if isinstance(event, Started):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan_merge("linear", family), tmp_path / "out", cluster=make_local("1"), on_event=stop)
    left = set(psutil.Process().children(recursive=True)) - before
    assert [process for process in left if "spawn_main" in " ".join(process.cmdline())] == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("options: {lifetme: 3}\n", "mine.yml: options: LocalCluster takes no 'lifetme'"),
        ("options: {protocl: tls}\n", "takes no 'protocl'; did you mean 'protocol'?"),
        ("options: {host: 256.0.0.1}\n", "mine.yml: LocalCluster could not be started: "),
    ],
)
def test_options_that_the_class_does_not_take_are_one_error(
    more: str, words: str, family: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError) as caught:
        run(plan_merge("linear", family), tmp_path / "out", cluster=make_local("1", more))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_says_who_works_twice_is_refused(family: Path) -> None:
    plan, cluster = plan_merge("linear", family), make_local("2")
    with pytest.raises(PlanError, match="leave out --workers and --threads"):
        choose_workers(plan, WorkerOptions(cluster=cluster, workers=2))
    with pytest.raises(PlanError, match="give one of the two"):
        choose_workers(plan, WorkerOptions(cluster=cluster, scheduler="tcp://127.0.0.1:1"))
    bad = parse_cluster("kind: local\nworkers: 1\nmemory: much\n", name="mine.yml")
    with pytest.raises(InputError, match=r"mine.yml: memory: 'much' is not a size"):
        choose_workers(plan, WorkerOptions(cluster=bad))


def test_memory_of_the_command_is_stronger_than_that_of_the_file(family: Path) -> None:
    plan, cluster = plan_merge("linear", family), make_local("2")
    silent = parse_cluster("kind: local\n")
    assert choose_workers(plan, WorkerOptions(cluster=cluster)).memory_bytes == 256 << 20
    assert choose_workers(plan, WorkerOptions(cluster=cluster, memory="300MiB")).memory_bytes == 300 << 20
    assert choose_workers(plan, WorkerOptions(cluster=silent)).memory_bytes == 1 << 30
    assert describe_plan(plan, cluster=cluster)["cluster"] == "mine.yml"


def test_storage_options_of_a_recipe_are_stronger_than_those_of_the_cluster_file(family: Path) -> None:
    plan = plan_merge("linear", family, more="storage_options: {s3: {profile: recipe}}\n")
    cluster = make_local("1", "storage_options: {s3: {profile: cluster, region: here}, gs: {project: a}}\n")
    assert choose_workers(plan, WorkerOptions(cluster=cluster)).storage == make_storage(
        {"s3": {"profile": "recipe", "region": "here"}, "gs": {"project": "a"}}
    )
    told = WorkerOptions(cluster=cluster, storage={"s3": {"region": "there"}})
    assert choose_workers(plan, told).storage == make_storage({"s3": {"profile": "recipe", "region": "there"}})
