"""Who runs the tasks of a plan: threads of this process, a cluster of processes, new or there already.

`distributed` is imported where there are processes, and only then.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from dask.delayed import Delayed

from mergemill.engine.runs import threads
from mergemill.engine.runs.clusters.preflight import Needs
from mergemill.engine.runs.guardless import check_main
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.runs.worker.workplace import Workplace


class Crew(Protocol):
    """Workers that are there, each with its workplace."""

    @property
    def workers(self) -> Workers:
        """Who they are."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is not as it should be, but will do."""

    @property
    def dashboard(self) -> str:
        """The address of the Dask dashboard; empty where there is none."""

    def check_needs(self, needs: Needs) -> None:
        """Raise `ClusterError` where workers lack what the merge needs of them."""

    def run_tasks(self, tasks: Sequence[Delayed], each: Callable[[Any], None]) -> None:
        """Run tasks, and call `each` in this thread with each result as it comes; the first error ends the run."""

    def stop(self) -> None:
        """Let `run_tasks` raise `RunError` soon, now and from now on; may be called in any thread."""


def open_crew(
    workers: Workers, token: str = "", tell_waiting: Callable[[float], None] = lambda waited_s: None
) -> AbstractContextManager[Crew]:
    """Start workers; when the block ends, tasks that still run end at their next slab, and nothing is left.

    token: what the keys of all tasks hold, and of no other run's. tell_waiting: called now and then, with the seconds,
    while the first worker of a cluster does not come.
    """
    if workers.are_threads:
        return threads.open_threads(workers)
    from mergemill.engine.runs.clusters import cluster

    if workers.cluster:
        return cluster.open_own(workers, workers.cluster, token, tell_waiting)
    if workers.scheduler:
        return cluster.open_scheduler(workers, token, tell_waiting)
    return cluster.open_cluster(workers, token)


def check_crew(workers: Workers, needs: Needs, tell_waiting: Callable[..., None], wait_s: float = 0.0) -> None:
    """Raise `ClusterError` unless the workers of a cluster that is there already have what the merge needs.

    Raises `PlanError` where worker processes of this machine would run the caller's file again. wait_s: for a scheduler
    that does not answer yet.
    """
    if workers.scheduler:
        from mergemill.engine.runs.clusters import cluster

        cluster.check_cluster(workers, needs, tell_waiting, wait_s)
    elif workers.processes or (workers.cluster and workers.cluster.kind == "local"):
        check_main()


def find_workplace() -> Workplace:
    """Return the workplace of the worker that runs this task."""
    if found := threads.find_workplace():
        return found
    from mergemill.engine.runs.clusters import plugin

    return plugin.find_workplace()
