"""What each worker process is set up with for a run, and how a task finds it there."""

from contextlib import ExitStack
from typing import Any

from distributed import Reschedule, Worker, WorkerPlugin, get_worker
from distributed.core import Status

from mergemill.engine.errors import ClusterError
from mergemill.engine.runs.clusters import probe
from mergemill.engine.runs.clusters.results import tell_result
from mergemill.engine.runs.worker.accelerator import open_device
from mergemill.engine.runs.worker.metrics import metered
from mergemill.engine.runs.worker.process import keep_freed_pages, set_up_process
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.cache import open_cache

PLUGIN = "mergemill-"  # how the names of plugins begin; they end with the id of their driver's client


class MergemillPlugin(WorkerPlugin):
    """Gives a worker its memory gate and arenas for the tasks of one run, and sets its process up."""

    def __init__(self, workers: Workers, token: str, topic: str) -> None:
        self.memory_bytes = workers.memory_bytes
        self.device = workers.device
        self.device_memory_bytes = workers.device_memory_bytes
        self.cache = workers.cache
        self.storage = workers.storage
        self.token = token  # in the keys of the run's tasks
        self.topic = topic  # that results are told by
        self.versions = _find_versions()  # of the driver
        self.workplace: Workplace | None = None  # where it could be set up

    def setup(self, worker: Worker) -> None:
        """Called on the worker when it joins; one of other versions gets no workplace, and its tasks fail at once."""
        self._set_up = ExitStack()
        self._worker = worker
        if self.versions != _find_versions():
            return
        # A task that is cut short by the end of its worker is another worker's, not an error.
        threads, cache = worker.state.nthreads, open_cache(self.cache)
        device = open_device(self.device, self.device_memory_bytes, threads)
        self.workplace = Workplace(self.memory_bytes, threads, cache, Reschedule, storage=self.storage, device=device)
        keep_freed_pages()
        self._set_up.enter_context(set_up_process())
        self._set_up.enter_context(metered(self.workplace))
        if device is not None:
            self._set_up.enter_context(device.limited())

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """Called on the worker when a task changes its state: its result goes ahead of the news that it is done."""
        if finish == "memory" and self.token in str(key):
            tell_result(self._worker, str(key), self.topic)

    def teardown(self, worker: Worker) -> None:
        """Called on the worker when it leaves: running tasks end at their next slab."""
        if self.workplace:
            self.workplace.stopping = True
        self._set_up.close()


def _find_versions() -> Any:
    """Return what must be the same on all workers."""
    return probe.look_around({})["versions"]


def find_workplace() -> Workplace:
    """Return the workplace of the worker that runs this task."""
    worker = get_worker()
    key = str(worker.get_current_task())
    for plugin in worker.plugins.values():
        if isinstance(plugin, MergemillPlugin) and plugin.token in key and plugin.workplace:
            return plugin.workplace
    if worker.status == Status.running:
        raise ClusterError(f"{worker.address}: this worker was not set up for the merge; see its log")
    raise Reschedule  # it is on its way out
