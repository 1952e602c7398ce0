"""A local cluster of worker processes, and what each is set up with; the only importer of distributed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import dask
from dask.delayed import Delayed
from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker

from mergemill.engine.run.failures import explain_failure
from mergemill.engine.run.process import set_up_process
from mergemill.engine.run.workers import Workers
from mergemill.engine.run.workplace import Workplace

PLUGIN = "mergemill"
SPARE_BYTES = 1 << 30  # Python, torch and Dask themselves, before Dask's own limit may stop a worker

# Dask's limits are a backstop only: tasks return a receipt each, and the gate bounds what they hold meanwhile.
_CONFIG = {
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.allowed-failures": 5,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": 0.9,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.worker.profile.enabled": False,
    "distributed.comm.timeouts.connect": "60s",
}


class Cluster:
    """A crew of worker processes."""

    def __init__(self, client: Client) -> None:
        self.client = client

    @property
    def dashboard(self) -> str:
        """The address of the Dask dashboard."""
        return str(self.client.dashboard_link)

    def run_tasks(self, tasks: Sequence[Delayed], each: Callable[[Any], None]) -> None:
        """Run tasks, and call `each` in this thread with each result as it comes; the first error ends the run."""
        futures = self.client.compute(list(tasks), optimize_graph=False)
        try:
            for future, result in as_completed(futures, loop=self.client.loop, with_results=True, raise_errors=False):
                if future.status != "finished":
                    failed = future.status == "error"
                    raise explain_failure(*(future.exception(), future.traceback()) if failed else (None, None))
                future.release()  # let each result go at once
                each(result)
        finally:
            self.client.cancel(futures, force=True)


@contextmanager
def open_cluster(workers: Workers) -> Iterator[Cluster]:
    """Start worker processes; when the block ends, everything is stopped."""
    with (
        dask.config.set(_CONFIG),
        LocalCluster(
            n_workers=workers.processes,
            threads_per_worker=workers.threads,
            memory_limit=workers.memory_bytes + SPARE_BYTES,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_plugin(MergemillPlugin(workers.memory_bytes, workers.threads), name=PLUGIN)
        yield Cluster(client)


class MergemillPlugin(WorkerPlugin):
    """Gives a worker its memory gate and arenas, and sets its process up."""

    def __init__(self, memory_bytes: int, threads: int) -> None:
        self.memory_bytes = memory_bytes
        self.threads = threads

    def setup(self, worker: Worker) -> None:
        """Called on the worker when it joins."""
        self.workplace = Workplace(self.memory_bytes, self.threads)
        self._set_up = ExitStack()
        self._set_up.enter_context(set_up_process())

    def teardown(self, worker: Worker) -> None:
        """Called on the worker when it leaves: running tasks end at their next slab."""
        self.workplace.stopping = True
        self._set_up.close()


def find_workplace() -> Workplace:
    """Return the workplace of the worker that runs this task."""
    plugin = get_worker().plugins[PLUGIN]
    assert isinstance(plugin, MergemillPlugin)
    return plugin.workplace
