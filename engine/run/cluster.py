"""Worker processes, of a cluster that is started or of one that is there already, and what each is set up with."""

import asyncio
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import dask
from dask.delayed import Delayed
from distributed import (
    Client,
    KilledWorker,
    LocalCluster,
    Reschedule,
    Worker,
    WorkerPlugin,
    as_completed,
    get_worker,
)
from distributed.comm.core import connect
from distributed.core import Status
from distributed.security import Security

from mergemill.engine.errors import ClusterError, RunError
from mergemill.engine.recipe import ClusterFile
from mergemill.engine.run.accelerator import open_device
from mergemill.engine.run.encryption import check_certificates, explain_refusal
from mergemill.engine.run.factories import start_cluster
from mergemill.engine.run.failures import WorkersDied, explain_failure
from mergemill.engine.run.metrics import metered
from mergemill.engine.run.preflight import PAUSE, Needs, check_settings, check_workers, make_limit, wait_for_first
from mergemill.engine.run.process import set_up_process
from mergemill.engine.run.watch import ALONE_S, ANSWER_S, DONE_IS_KEPT, SchedulerLost, Watch
from mergemill.engine.run.workers import Workers
from mergemill.engine.run.workplace import Workplace
from mergemill.engine.storage.cache import open_cache
from mergemill.engine.storage.store import use_options

CONNECT_S = 10  # for a scheduler to answer
WORKERS_S = 60  # for a first worker to join it
REJOIN_S = 60.0  # for a scheduler to answer again that was lost
CLOSE_S = 5.0  # for the connections of a client to end
MOST_LOST = 3  # schedulers in a row of which none brings a result
TRIES = 3  # of a task that raises an error, on whichever workers
FROZEN_S = 25.0  # without a sign of life of a worker; Dask looks as often, and then takes 4 s to kill it
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}  # which devices a process sees

# Dask's limits are a backstop only: tasks return a receipt each, and the gate bounds what they hold meanwhile.
_CONFIG = {
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.allowed-failures": 5,
    "distributed.scheduler.worker-ttl": f"{FROZEN_S}s",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": PAUSE,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.worker.profile.enabled": False,
    "distributed.comm.timeouts.connect": "60s",
}
# A task is 2 kB of the graph, and 10,000 of them are one merge: nothing that a user could do better, as Dask advises.
_GRAPH = {"distributed.admin.large-graph-warning-threshold": "1GiB"}


class Cluster:
    """A crew of worker processes."""

    warnings: tuple[str, ...] = ()
    alone_s = ALONE_S  # without any worker

    def __init__(self, client: Client, workers: Workers) -> None:
        self.client = client
        self.workers = workers
        self._watch = Watch(client, workers.scheduler or "the cluster", alone_s=self.alone_s)
        self._stopping = False

    @property
    def dashboard(self) -> str:
        """The address of the Dask dashboard."""
        return str(self.client.dashboard_link)

    def run_tasks(self, tasks: Sequence[Delayed], each: Callable[[Any], None]) -> None:
        """Run tasks, and call `each` in this thread with each result as it comes; the first error ends the run.

        Where the scheduler is lost, those without a result are run by the next one.
        """
        left = {task.key: task for task in tasks}
        vain = 0  # schedulers lost since a result came
        while left:
            before = len(left)
            try:
                self._run(left, each)
            except SchedulerLost as error:
                vain = vain + 1 if len(left) == before else 0
                if vain > MOST_LOST:
                    raise ClusterError(
                        f"{self.workers.scheduler}: lost again and again: {error}; {DONE_IS_KEPT}"
                    ) from error
                self.rejoin(error)

    def rejoin(self, lost: SchedulerLost) -> None:
        """Find the scheduler again, or raise `ClusterError`: here it is in this process."""
        raise ClusterError(f"the cluster's scheduler is lost ({lost}); {DONE_IS_KEPT}") from lost

    def stop(self) -> None:
        """Let `run_tasks` end with an error, at its next look."""
        self._stopping = True

    def check_going(self) -> None:
        """Raise `RunError` once it is to stop."""
        if self._stopping:
            raise RunError("the workers are being stopped")

    def check_needs(self, needs: Needs) -> None:
        """They are on this machine."""

    def check_again(self) -> None:
        """Raise `ClusterError` where workers that came later cannot do this merge."""

    def _run(self, left: dict[Any, Delayed], each: Callable[[Any], None]) -> None:
        """Run the tasks that are left, and take out what has a result; no task is sent to a scheduler that is lost."""
        self._watch.look(now=True)
        with dask.config.set(_GRAPH):
            futures = self.client.compute(list(left.values()), optimize_graph=False, retries=TRIES - 1)
        try:
            for future, result in self._iter_results(futures):
                if future.cancelled() or isinstance(result, CancelledError):
                    raise SchedulerLost("it has cancelled the tasks")
                if future.status == "error":
                    self._fail(future)
                future.release()  # let each result go at once
                del left[future.key]
                each(result)
        finally:
            if self.client.status == "running":
                self.client.cancel(futures, force=True)

    def _iter_results(self, futures: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield futures and results as they come, and look meanwhile whether the cluster is there."""
        coming = as_completed(futures, loop=self.client.loop, with_results=True, raise_errors=False)
        while not coming.is_empty():
            while coming.has_ready():
                yield next(coming)
            with coming.thread_condition:
                coming.thread_condition.wait(0.1)  # as Dask itself does
            self.check_going()
            # One whose result was on its way when the connection broke would never come.
            if self._watch.look() and any(future.cancelled() for future in list(coming.futures)):
                raise SchedulerLost("the connection broke")

    def _fail(self, future: Any) -> NoReturn:
        """Raise what ends the run."""
        error = future.exception()
        self._watch.look(now=True)  # of another scheduler, which knows nothing of our plugin, no error counts
        if isinstance(error, KilledWorker):
            raise WorkersDied(str(error.task), error.allowed_failures + 1) from error
        self.check_again()
        raise explain_failure(error, future.traceback())


class Foreign(Cluster):
    """A crew of workers that somebody else has started."""

    def __init__(self, client: Client, workers: Workers, token: str) -> None:
        super().__init__(client, workers)
        self._token = token
        self._needs = Needs()

    def join(self) -> None:
        """Wait for a worker, and set all workers up, those too that come later."""
        threads = _wait_for_workers(self.client, self.workers.scheduler)
        self.workers = replace(self.workers, processes=len(threads), threads=max(threads))
        self.warnings = check_settings(self.client)
        self.client.register_plugin(MergemillPlugin(self.workers, self._token), name=f"mergemill-{self._token}")

    def rejoin(self, lost: SchedulerLost) -> None:
        """Wait for a scheduler to answer there again, and for a worker."""
        self.client.close(CLOSE_S)
        self.client = _connect_again(self.workers.scheduler, lost)
        self._watch = Watch(self.client, self.workers.scheduler, alone_s=self.alone_s)
        with suppress(OSError):  # lost once more: the next look tells
            self.join()

    def check_needs(self, needs: Needs) -> None:
        """Raise `ClusterError` where a worker lacks what this process has, or what the merge needs."""
        self._needs = needs
        check_workers(self.client, self.workers, needs)

    def check_again(self) -> None:
        """Raise `ClusterError` where workers that came later cannot do this merge."""
        check_workers(self.client, self.workers, self._needs, all_answer=False)  # some may be about to die

    def leave(self) -> None:
        """Take from the workers what is ours."""
        with suppress(OSError):  # a scheduler that is gone has nothing of ours
            if self.client.status == "running":
                remove: Any = self.client.scheduler.unregister_worker_plugin  # type: ignore[union-attr]
                self.client.sync(remove, name=f"mergemill-{self._token}", callback_timeout=ANSWER_S)
        self.client.close(CLOSE_S)


class Own(Cluster):
    """A crew of workers that a cluster file has had started, and that come when they come."""

    alone_s = math.inf

    def __init__(self, client: Client, workers: Workers, token: str) -> None:
        super().__init__(client, workers)
        self._token = token
        self._needs = Needs()
        self._is_set_up = False

    def check_needs(self, needs: Needs) -> None:
        """Wait for a first worker, as long as it takes, then do as for workers of somebody else.

        Only those that passed are set up: one that lacks mergemill could not even load the plugin.
        """
        wait_for_first(self.client, self.check_going)
        self._needs = needs
        check_workers(self.client, self.workers, needs)
        if not self._is_set_up:
            self.client.register_plugin(MergemillPlugin(self.workers, self._token), name=f"mergemill-{self._token}")
            self._is_set_up = True
        found = _list_threads(self.client)
        self.workers = replace(self.workers, processes=len(found), threads=max(found, default=self.workers.threads))

    def check_again(self) -> None:
        """Raise `ClusterError` where workers that came later cannot do this merge."""
        check_workers(self.client, self.workers, self._needs, all_answer=False)


@contextmanager
def open_cluster(workers: Workers, token: str = "") -> Iterator[Cluster]:
    """Start worker processes; when the block ends, everything is stopped."""
    with (
        dask.config.set(_CONFIG),
        LocalCluster(
            n_workers=workers.processes if workers.device == "cpu" else 0,
            threads_per_worker=workers.threads,
            memory_limit=make_limit(workers.memory_bytes),
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        if workers.device != "cpu":
            give_each_a_device(cluster, workers.device, workers.processes)
            client.wait_for_workers(workers.processes, timeout=WORKERS_S)
        client.register_plugin(MergemillPlugin(workers, token), name=f"mergemill-{token}")
        yield Cluster(client, workers)


def give_each_a_device(cluster: LocalCluster, kind: str, count: int) -> None:
    """Start worker processes, each of which sees one device of this machine."""
    variable = VISIBLE.get(kind, "")
    seen = os.environ.get(variable)
    devices = seen.split(",") if seen else [str(number) for number in range(count)]
    for number, device in enumerate(devices[:count]):
        env = {variable: device} if variable else {}
        options = {**cluster.new_spec["options"], "env": env}
        cluster.worker_spec[number] = {**cluster.new_spec, "options": options}
    cluster.scale(count)


@contextmanager
def open_own(workers: Workers, file: ClusterFile, token: str) -> Iterator[Cluster]:
    """Start the cluster of a file; when the block ends, it is stopped. Its workers may still be on their way."""
    with (
        dask.config.set(_CONFIG),
        start_cluster(file, make_limit(workers.memory_bytes)) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        crew = Own(client, workers, token)
        crew.warnings = check_settings(client)
        yield crew


@contextmanager
def open_scheduler(workers: Workers, token: str) -> Iterator[Cluster]:
    """Use the workers of a cluster that is there already; when the block ends, nothing of ours is left on them."""
    with _connect(workers.scheduler) as client:
        crew = Foreign(client, workers, token)
        try:
            crew.join()
            yield crew
        finally:
            crew.leave()


def check_cluster(workers: Workers, needs: Needs) -> None:
    """Raise `ClusterError` unless a scheduler answers whose workers have what the merge needs."""
    with _connect(workers.scheduler) as client:
        _wait_for_workers(client, workers.scheduler)
        check_workers(client, workers, needs)


def _connect(scheduler: str) -> Client:
    """Return a client of the scheduler at an address, or that a file names."""
    check_certificates(scheduler)
    try:
        address = json.loads(Path(scheduler).read_text())["address"] if scheduler.endswith(".json") else scheduler
        with ThreadPoolExecutor(1) as pool:  # this thread may have a running loop, as in a notebook
            pool.submit(asyncio.run, _shake_hands(address)).result()
        return Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, KeyError) as error:
        raise ClusterError(explain_refusal(scheduler, error)) from error


async def _shake_hands(address: str) -> None:
    """Connect once: a client would wait for ever for a scheduler that is frozen, for which the kernel still listens."""
    options = Security().get_connection_args("client")
    try:
        comm = await asyncio.wait_for(connect(address, timeout=CONNECT_S, **options), CONNECT_S + 1)
    except TimeoutError as error:
        raise TimeoutError(f"it is silent for {CONNECT_S} s") from error
    await comm.close()


def _connect_again(scheduler: str, lost: SchedulerLost) -> Client:
    """Return a client of the scheduler that comes after one that is lost."""
    end_s = time.monotonic() + REJOIN_S
    while True:
        try:
            return _connect(scheduler)
        except ClusterError as error:
            if time.monotonic() > end_s:
                raise ClusterError(
                    f"{scheduler}: the scheduler is lost ({lost}), and none has answered there for {REJOIN_S:.0f} s; "
                    f"{DONE_IS_KEPT}"
                ) from error
        time.sleep(1.0)


def _wait_for_workers(client: Client, scheduler: str) -> list[int]:
    """Return the threads of each worker."""
    end_s = time.monotonic() + WORKERS_S
    ask: Any = client.scheduler.identity  # type: ignore[union-attr]
    while True:
        try:
            found = client.sync(ask, n_workers=-1, callback_timeout=ANSWER_S)["workers"]
        except OSError as error:
            raise ClusterError(f"{scheduler}: the scheduler does not answer: {error}") from error
        if found:
            return [info["nthreads"] for info in found.values()]
        if time.monotonic() > end_s:
            raise ClusterError(f"{scheduler}: no worker has joined this scheduler in {WORKERS_S} s; start some")
        time.sleep(0.1)


def _list_threads(client: Client) -> list[int]:
    """Return the threads of each worker that is there."""
    return [info["nthreads"] for info in client.scheduler_info(n_workers=-1)["workers"].values()]


class MergemillPlugin(WorkerPlugin):
    """Gives a worker its memory gate and arenas for the tasks of one run, and sets its process up."""

    def __init__(self, workers: Workers, token: str) -> None:
        self.memory_bytes = workers.memory_bytes
        self.device = workers.device
        self.device_memory_bytes = workers.device_memory_bytes
        self.cache = workers.cache
        self.storage = workers.storage
        self.token = token  # in the keys of the run's tasks

    def setup(self, worker: Worker) -> None:
        """Called on the worker when it joins."""
        use_options(self.storage)
        # A task that is cut short by the end of its worker is another worker's, not an error.
        threads, cache = worker.state.nthreads, open_cache(self.cache)
        device = open_device(self.device, self.device_memory_bytes, threads)
        self.workplace = Workplace(self.memory_bytes, threads, cache, Reschedule, device=device)
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
    for plugin in worker.plugins.values():
        if isinstance(plugin, MergemillPlugin) and plugin.token in key:
            return plugin.workplace
    if worker.status == Status.running:
        raise ClusterError(f"{worker.address}: this worker was not set up for the merge; see its log")
    raise Reschedule  # it is on its way out
