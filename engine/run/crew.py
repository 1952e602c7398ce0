"""Who runs the tasks of a plan: threads of this process, or a local cluster of processes, behind one face.

`distributed` is imported where there are processes, and only then.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from dask.delayed import Delayed

from mergemill.engine.run import threads
from mergemill.engine.run.workers import Workers
from mergemill.engine.run.workplace import Workplace


class Crew(Protocol):
    """Workers that are there, each with its workplace."""

    @property
    def dashboard(self) -> str:
        """The address of the Dask dashboard; empty where there is none."""

    def run_tasks(self, tasks: Sequence[Delayed], each: Callable[[Any], None]) -> None:
        """Run tasks, and call `each` in this thread with each result as it comes; the first error ends the run."""


def open_crew(workers: Workers) -> AbstractContextManager[Crew]:
    """Start workers; when the block ends, tasks that still run end at their next slab, and nothing is left."""
    if not workers.processes:
        return threads.open_threads(workers)
    from mergemill.engine.run import cluster

    return cluster.open_cluster(workers)


def find_workplace() -> Workplace:
    """Return the workplace of the worker that runs this task."""
    if found := threads.find_workplace():
        return found
    from mergemill.engine.run import cluster

    return cluster.find_workplace()
