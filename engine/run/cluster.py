"""Worker processes, of a cluster that is started or of one that is there already, and what each is set up with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
from dask.delayed import Delayed
from distributed import Client, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker

from mergemill.engine.errors import ClusterError
from mergemill.engine.recipe import ClusterFile
from mergemill.engine.run.encryption import check_certificates, explain_refusal
from mergemill.engine.run.factories import start_cluster
from mergemill.engine.run.failures import explain_failure
from mergemill.engine.run.metrics import metered
from mergemill.engine.run.preflight import check_settings, check_workers, wait_for_first
from mergemill.engine.run.process import set_up_process
from mergemill.engine.run.workers import Workers
from mergemill.engine.run.workplace import Workplace
from mergemill.engine.storage.cache import open_cache
from mergemill.engine.storage.store import use_options

CONNECT_S = 10  # for a scheduler to answer
WORKERS_S = 60  # for a first worker to join it
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

    warnings: tuple[str, ...] = ()

    def __init__(self, client: Client, workers: Workers) -> None:
        self.client = client
        self.workers = workers

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

    def check_files(self, files: Mapping[str, int]) -> None:
        """They are on this machine."""


class Foreign(Cluster):
    """A crew of workers that somebody else has started."""

    def check_files(self, files: Mapping[str, int]) -> None:
        """Raise `ClusterError` where a worker lacks what this process has, or does not see `files`."""
        check_workers(self.client, files)


class Own(Cluster):
    """A crew of workers that a cluster file has had started, and that come when they come."""

    def __init__(self, client: Client, workers: Workers, token: str) -> None:
        super().__init__(client, workers)
        self._token = token
        self._is_set_up = False

    def check_files(self, files: Mapping[str, int]) -> None:
        """Wait for a first worker, as long as it takes, then do as for workers of somebody else.

        Only those that passed are set up: one that lacks mergemill could not even load the plugin.
        """
        wait_for_first(self.client)
        check_workers(self.client, files)
        if not self._is_set_up:
            self.client.register_plugin(MergemillPlugin(self.workers, self._token), name=f"mergemill-{self._token}")
            self._is_set_up = True
        found = _list_threads(self.client)
        self.workers = replace(self.workers, processes=len(found), threads=max(found, default=self.workers.threads))


@contextmanager
def open_cluster(workers: Workers, token: str = "") -> Iterator[Cluster]:
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
        client.register_plugin(MergemillPlugin(workers, token), name=f"mergemill-{token}")
        yield Cluster(client, workers)


@contextmanager
def open_own(workers: Workers, file: ClusterFile, token: str) -> Iterator[Cluster]:
    """Start the cluster of a file; when the block ends, it is stopped. Its workers may still be on their way."""
    with (
        dask.config.set(_CONFIG),
        start_cluster(file, workers.memory_bytes + SPARE_BYTES) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        crew = Own(client, workers, token)
        crew.warnings = check_settings(client)
        yield crew


@contextmanager
def open_scheduler(workers: Workers, token: str) -> Iterator[Cluster]:
    """Use the workers of a cluster that is there already; when the block ends, nothing of ours is left on them."""
    name = f"mergemill-{token}"
    with _connect(workers.scheduler) as client:
        found = _wait_for_workers(client, workers.scheduler)
        crew = Foreign(client, replace(workers, processes=len(found), threads=max(found)))
        crew.warnings = check_settings(client)
        client.register_plugin(MergemillPlugin(workers, token), name=name)
        try:
            yield crew
        finally:
            with suppress(OSError):  # a scheduler that is gone has nothing of ours
                client.unregister_worker_plugin(name)


def check_cluster(workers: Workers, files: Mapping[str, int]) -> None:
    """Raise `ClusterError` unless a scheduler answers whose workers have what this process has, and see `files`."""
    with _connect(workers.scheduler) as client:
        _wait_for_workers(client, workers.scheduler)
        check_workers(client, files)


def _connect(scheduler: str) -> Client:
    """Return a client of the scheduler at an address, or that a file names."""
    check_certificates(scheduler)
    try:
        if scheduler.endswith(".json"):
            Path(scheduler).stat()  # the client would wait for it to appear
            return Client(scheduler_file=scheduler, timeout=CONNECT_S, set_as_default=False)
        return Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(explain_refusal(scheduler, error)) from error


def _wait_for_workers(client: Client, scheduler: str) -> list[int]:
    """Return the threads of each worker."""
    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=WORKERS_S)
    threads = _list_threads(client)
    if not threads:
        raise ClusterError(f"{scheduler}: no worker has joined this scheduler in {WORKERS_S} s; start some")
    return threads


def _list_threads(client: Client) -> list[int]:
    """Return the threads of each worker that is there."""
    return [info["nthreads"] for info in client.scheduler_info(n_workers=-1)["workers"].values()]


class MergemillPlugin(WorkerPlugin):
    """Gives a worker its memory gate and arenas for the tasks of one run, and sets its process up."""

    def __init__(self, workers: Workers, token: str) -> None:
        self.memory_bytes = workers.memory_bytes
        self.cache = workers.cache
        self.storage = workers.storage
        self.token = token  # in the keys of the run's tasks

    def setup(self, worker: Worker) -> None:
        """Called on the worker when it joins."""
        use_options(self.storage)
        self.workplace = Workplace(self.memory_bytes, worker.state.nthreads, open_cache(self.cache))
        self._set_up = ExitStack()
        self._set_up.enter_context(set_up_process())
        self._set_up.enter_context(metered(self.workplace))

    def teardown(self, worker: Worker) -> None:
        """Called on the worker when it leaves: running tasks end at their next slab."""
        self.workplace.stopping = True
        self._set_up.close()


def find_workplace() -> Workplace:
    """Return the workplace of the worker that runs this task."""
    worker = get_worker()
    key = str(worker.get_current_task())
    ours = [plugin for plugin in worker.plugins.values() if isinstance(plugin, MergemillPlugin)]
    return next(plugin.workplace for plugin in ours if plugin.token in key)
