"""Dask clusters and what a worker is set up with; beside `graph`, the only importer of dask and distributed."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import dask
from distributed import Client, LocalCluster, Worker, WorkerPlugin, get_worker

from mergemill.engine.run.workplace import Workplace
from mergemill.engine.storage.ranges import close_all
from mergemill.engine.tensors.lazy import torch

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
_MALLOPT_TRIM, _MALLOPT_MMAP = -1, -3  # of malloc.h


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers a local cluster has, and what each is given."""

    processes: int  # 0: one worker of `threads` threads in this process
    threads: int  # of each worker
    memory_bytes: int  # promised to each worker

    @property
    def count(self) -> int:
        """The number of Dask workers."""
        return max(1, self.processes)


@contextmanager
def open_cluster(workers: Workers) -> Iterator[Client]:
    """Start a local cluster and yield its client; everything is stopped afterwards."""
    with (
        dask.config.set(_CONFIG),
        LocalCluster(
            n_workers=workers.count,
            threads_per_worker=workers.threads,
            processes=workers.processes > 0,
            memory_limit=workers.memory_bytes + SPARE_BYTES if workers.processes else 0,
            host="127.0.0.1",
            protocol="tcp",  # also for threads: the in-process one looks for a network, and warns where there is none
            dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_plugin(MergemillPlugin(workers.memory_bytes, workers.threads), name=PLUGIN)
        yield client


class MergemillPlugin(WorkerPlugin):
    """Gives a worker its memory gate and arenas, one torch thread a task, and an allocator that keeps its pages."""

    def __init__(self, memory_bytes: int, threads: int) -> None:
        self.memory_bytes = memory_bytes
        self.threads = threads

    def setup(self, worker: Worker) -> None:
        """Called on the worker when it joins."""
        self.workplace = Workplace(self.memory_bytes, self.threads)
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        keep_freed_pages()

    def teardown(self, worker: Worker) -> None:
        """Called on the worker when it leaves: running tasks end at their next slab."""
        self.workplace.stopping = True
        torch.set_num_threads(self._torch_threads)
        close_all()


def find_workplace() -> Workplace:
    """Return the workplace of the worker that runs this task."""
    plugin = get_worker().plugins[PLUGIN]
    assert isinstance(plugin, MergemillPlugin)
    return plugin.workplace


def keep_freed_pages() -> None:
    """Let glibc keep freed blocks of up to 8 MiB instead of returning their pages.

    Dask's nanny sets MALLOC_TRIM_THRESHOLD_, after which every temporary of a kernel would be mapped and
    faulted in anew. Elsewhere than on glibc nothing is done.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and os.uname().sysname == "Linux":
        library.mallopt(_MALLOPT_MMAP, 8 << 20)
        library.mallopt(_MALLOPT_TRIM, 32 << 20)
