"""Crews of worker processes: those of this machine, of somebody else's cluster, of one that a cluster file starts."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import dask
from dask.delayed import Delayed
from distributed import Client, KilledWorker, as_completed

from mergemill.engine.errors import ClusterError, RunError
from mergemill.engine.runs.clusters import connect, probe
from mergemill.engine.runs.clusters.plugin import PLUGIN, MergemillPlugin
from mergemill.engine.runs.clusters.preflight import Needs, as_source, check_settings, check_workers
from mergemill.engine.runs.clusters.privacy import serves_pages
from mergemill.engine.runs.clusters.results import TaskResults
from mergemill.engine.runs.clusters.watch import (
    ALONE_S,
    ANSWER_S,
    DONE_IS_KEPT,
    ClusterWatch,
    SchedulerLost,
    explaining_loss,
    noticing_loss,
)
from mergemill.engine.runs.tasks.failures import WorkersDied, explain_failure
from mergemill.engine.runs.worker.workers import Workers

LEFT_ALONE = ("local", "cuda", "ssh")  # kinds of clusters where nobody starts a worker for one that its nanny gave up
MOST_DYING = 5  # calls in a row that end because a worker died meanwhile
DYING_S = 0.2  # until the scheduler has noticed
MOST_LOST = 3  # schedulers in a row of which none brings a result
TRIES = 3  # of a task that raises an error, on whichever workers

# A task is 2 kB of the graph, and 10,000 of them are one merge: nothing that a user could do better, as Dask advises.
_GRAPH = {"distributed.admin.large-graph-warning-threshold": "1GiB"}


class Cluster:
    """A crew of worker processes."""

    warnings: tuple[str, ...] = ()
    alone_s = 60.0  # without any worker: here a nanny starts the next one within seconds, or has given up
    hint = "those that were started here end, or are killed, as they start"

    def __init__(
        self,
        client: Client,
        workers: Workers,
        token: str,
        tell_waiting: Callable[[float], None] = lambda waited_s: None,
    ) -> None:
        self.client = client
        self.workers = workers
        self._token = token
        self._tell_waiting = tell_waiting
        self._watch = self._make_watch()
        self._results = TaskResults(client)
        self._stopping = False

    @property
    def _plugin_name(self) -> str:
        return f"{PLUGIN}{self._token}-{self.client.id}"

    @property
    def dashboard(self) -> str:
        """The address of the Dask dashboard; empty where there is none."""
        pages = bool(self.workers.scheduler) or serves_pages(self.workers.cluster)
        return str(self.client.dashboard_link) if pages and self._draws_pages() else ""

    def _draws_pages(self) -> bool:
        """Whether the scheduler has bokeh; without it, what is served there is a line that says so."""
        with as_source():
            return bool(self.client.run_on_scheduler(probe.has_module, "bokeh"))

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
                for key, result in self._results.take_told():
                    if left.pop(key, None) is not None:
                        each(result)
                vain = vain + 1 if len(left) == before else 0
                if vain > MOST_LOST:
                    raise self._explain_losses(error) from error
                self.rejoin(error)

    def _explain_losses(self, last: SchedulerLost) -> ClusterError:
        return ClusterError(f"{self.workers.name}: lost again and again: {last}; {DONE_IS_KEPT}")

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

    def set_up_workers(self) -> None:
        """Give all workers what they need for the run, those too that come later.

        A worker that dies meanwhile breaks the scheduler's call to all of them (its `handle_comm` takes the loss of
        that worker for the loss of this client), so the call is made again: each worker takes the later plugin.
        """
        plugin = MergemillPlugin(self.workers, self._token, self.client.id)
        for left in reversed(range(MOST_DYING)):
            try:
                self.client.register_plugin(plugin, name=self._plugin_name)
            except OSError:
                if not left:
                    raise
                time.sleep(DYING_S)
            else:
                return

    def check_needs(self, needs: Needs) -> None:
        """They are on this machine."""

    def check_again(self) -> None:
        """Raise `ClusterError` where workers that came later cannot do this merge."""

    def close(self) -> None:
        """Take from the cluster what is ours."""
        self._results.close()

    def _make_watch(self) -> ClusterWatch:
        return ClusterWatch(
            self.client, self.workers.name, alone_s=self.alone_s, hint=self.hint, tell_alone=self._tell_waiting
        )

    def _run(self, left: dict[Any, Delayed], each: Callable[[Any], None]) -> None:
        """Run the tasks that are left, and take out what has a result; no task is sent to a scheduler that is lost."""
        self._watch.look(now=True)
        with dask.config.set(_GRAPH):
            futures = self.client.compute(list(left.values()), optimize_graph=False, retries=TRIES - 1)
        try:
            self._results.expect(futures)
            for future in self._iter_done(futures):
                result = self._results.take(future, self._look)
                if result is None:
                    self._fail(future)
                del left[future.key]
                each(result)
        finally:
            # Not cancelled: for that a scheduler looks at each key once for each key.
            if self.client.status == "running":
                for future in futures:
                    future.release()

    def _iter_done(self, futures: Sequence[Any]) -> Iterator[Any]:
        """Yield futures as they are done, and look meanwhile whether the cluster is there."""
        coming = as_completed(futures, loop=self.client.loop)
        while not coming.is_empty():
            while coming.has_ready():
                yield next(coming)
            with coming.thread_condition:
                coming.thread_condition.wait(0.1)  # as Dask itself does
            # One whose result was on its way when the connection broke would never come.
            if self._look() and any(map(self._is_lost, list(coming.futures))):
                raise SchedulerLost("the connection broke")

    def _look(self) -> bool:
        """Raise where the run is to end, or the cluster is lost; returns whether it was time to look at that."""
        self.check_going()
        return self._watch.look()

    def _is_lost(self, future: Any) -> bool:
        return future.cancelled() and not self._results.is_told(future)

    def _fail(self, future: Any) -> NoReturn:
        """Raise what ends the run, or `SchedulerLost`."""
        if future.cancelled():
            raise SchedulerLost("it has cancelled the tasks")
        error = future.exception()
        self._watch.look(now=True)  # of another scheduler, which knows nothing of our plugin, no error counts
        if isinstance(error, KilledWorker):
            raise WorkersDied(str(error.task), error.allowed_failures + 1) from error
        self.check_again()
        raise explain_failure(error, future.traceback())


class Joining(Cluster):
    """A crew of workers that come when they come, and are asked for what the merge needs."""

    _needs = Needs()

    def check_again(self) -> None:
        """Raise `ClusterError` where workers that came later cannot do this merge."""
        with noticing_loss():
            check_workers(self.client, self.workers, self._needs, all_answer=False)  # some may be about to die


class Foreign(Joining):
    """A crew of workers that somebody else has started."""

    alone_s = ALONE_S
    hint = "start some"

    def join(self) -> None:
        """Wait for a worker, and set all workers up, those too that come later; or raise `SchedulerLost`."""
        threads = connect.wait_for_workers(self.client, self.workers.scheduler, self._tell_waiting)
        self.workers = replace(self.workers, processes=len(threads), threads=max(threads))
        with noticing_loss():
            self.warnings = check_settings(self.client)
            self._remove_left()
            self.set_up_workers()

    def _remove_left(self) -> None:
        """Take from the workers what drivers have left that were killed: it holds the memory that they promised."""
        with as_source():
            left = self.client.run_on_scheduler(probe.list_left_plugins, PLUGIN)
        for name in left:
            self._unregister(name)

    def _unregister(self, name: str) -> None:
        remove: Any = self.client.scheduler.unregister_worker_plugin  # type: ignore[union-attr]
        # It is gone already, or the scheduler is; or a worker is about to be, and takes it along.
        with suppress(ValueError, OSError):
            self.client.sync(remove, name=name, callback_timeout=ANSWER_S)

    def rejoin(self, lost: SchedulerLost) -> None:
        """Wait for a scheduler to answer there again, and for a worker."""
        for _ in range(MOST_LOST):
            before = self._plugin_name
            connect.close_client(self.client)
            self.client = connect.open_client_again(self.workers.scheduler, lost)
            self._watch = self._make_watch()
            self._results = TaskResults(self.client)
            try:
                self.join()
            except SchedulerLost as error:
                lost = error
                continue
            self._unregister(before)  # where it is the same scheduler
            return
        raise self._explain_losses(lost) from lost

    def check_needs(self, needs: Needs) -> None:
        """Raise `ClusterError` where a worker lacks what this process has, or what the merge needs."""
        self._needs = needs
        with explaining_loss(self.workers.name), noticing_loss():
            check_workers(self.client, self.workers, needs)

    def close(self) -> None:
        """Take from the cluster what is ours."""
        super().close()
        if self.client.status == "running":
            self._unregister(self._plugin_name)
        connect.close_client(self.client)


class Own(Joining):
    """A crew of workers that a cluster file has had started."""

    _is_set_up = False

    def __init__(self, client: Client, workers: Workers, token: str, tell_waiting: Callable[[float], None]) -> None:
        assert workers.cluster is not None
        if workers.cluster.kind not in LEFT_ALONE:
            self.alone_s = math.inf
        super().__init__(client, workers, token, tell_waiting)

    def check_needs(self, needs: Needs) -> None:
        """Wait for a first worker, as long as it takes, then do as for workers of somebody else.

        Only those that passed are set up: one that lacks mergemill could not even load the plugin.
        """
        self._needs = needs
        with explaining_loss(self.workers.name):
            connect.wait_for_first(self.client, self.check_going, self._tell_waiting)
            with noticing_loss():
                check_workers(self.client, self.workers, needs)
                if not self._is_set_up:
                    self.set_up_workers()
                    self._is_set_up = True
        found = _list_threads(self.client)
        self.workers = replace(self.workers, processes=len(found), threads=max(found, default=self.workers.threads))


def _list_threads(client: Client) -> list[int]:
    """Return the threads of each worker that is there."""
    return [info["nthreads"] for info in client.scheduler_info(n_workers=-1)["workers"].values()]
