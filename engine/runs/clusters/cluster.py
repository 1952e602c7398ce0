"""Opening a cluster for a merge: one that is started for it, or one that is there already."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

import dask
from distributed import Client, LocalCluster

from mergemill.engine.errors import ClusterError
from mergemill.engine.recipe import ClusterFile
from mergemill.engine.runs.clusters import connect
from mergemill.engine.runs.clusters.dask_crew import Cluster, Foreign, Own
from mergemill.engine.runs.clusters.factories import start_cluster
from mergemill.engine.runs.clusters.preflight import PAUSE, Needs, check_settings, check_workers, make_limit
from mergemill.engine.runs.clusters.privacy import make_private, set_pages
from mergemill.engine.runs.clusters.watch import DONE_IS_KEPT, explaining_loss, noticing_loss
from mergemill.engine.runs.worker.workers import Workers

FROZEN_S = 25.0  # without a sign of life of a worker; Dask looks as often, and then takes 4 s to kill it
STARTS = 3  # of a cluster whose workers die as they start
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}  # which devices a process sees

# Dask's limits are a backstop only: tasks return a receipt each, and the gate bounds what they hold meanwhile.
# At Dask's own intervals (20, 100 and 500 ms) eight workers that do nothing take a fifth of a core, with their nannies.
_CONFIG = {
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.allowed-failures": 5,
    "distributed.scheduler.worker-ttl": f"{FROZEN_S}s",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": PAUSE,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.worker.memory.monitor-interval": "500ms",
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.comm.timeouts.connect": "60s",
}


@contextmanager
def open_cluster(workers: Workers, token: str = "") -> Iterator[Cluster]:
    """Start worker processes; when the block ends, everything is stopped."""
    with (
        dask.config.set({**_CONFIG, **set_pages()}),
        _start_processes(workers) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        if workers.device != "cpu":
            give_each_a_device(cluster, workers.device, workers.processes)
            client.wait_for_workers(workers.processes, timeout=connect.WORKERS_S)
        with closing(Cluster(client, workers, token)) as crew:
            crew.set_up_workers()
            yield crew


def _start_processes(workers: Workers) -> LocalCluster:
    """Start a cluster on this machine; again, where a worker dies as it starts: one that dies later is replaced too."""
    for _ in range(STARTS - 1):
        with suppress(RuntimeError):  # of Dask's own; it has stopped what was started
            return _start_once(workers)
    try:
        return _start_once(workers)
    except RuntimeError as error:
        raise ClusterError(f"a worker ended, or was killed, while it started ({error}); {DONE_IS_KEPT}") from error


def _start_once(workers: Workers) -> LocalCluster:
    return LocalCluster(
        n_workers=workers.processes if workers.device == "cpu" else 0,
        threads_per_worker=workers.threads,
        memory_limit=make_limit(workers.memory_bytes, workers.device),
        silence_logs=50,
        **make_private(),
    )


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
def open_own(
    workers: Workers, file: ClusterFile, token: str, tell_waiting: Callable[[float], None]
) -> Iterator[Cluster]:
    """Start the cluster of a file; when the block ends, it is stopped. Its workers may still be on their way."""
    with (
        dask.config.set({**_CONFIG, **set_pages(file)}),
        start_cluster(file, make_limit(workers.memory_bytes, workers.device)) as cluster,
        Client(cluster, set_as_default=False) as client,
        closing(Own(client, workers, token, tell_waiting)) as crew,
    ):
        with explaining_loss(workers.name), noticing_loss():
            crew.warnings = check_settings(client)
        yield crew


@contextmanager
def open_scheduler(workers: Workers, token: str, tell_waiting: Callable[[float], None]) -> Iterator[Cluster]:
    """Use the workers of a cluster that is there already; when the block ends, nothing of ours is left on them."""
    with (
        connect.opened_client(workers.scheduler) as client,
        closing(Foreign(client, workers, token, tell_waiting)) as crew,
    ):
        with explaining_loss(workers.scheduler):
            crew.join()
        yield crew


def check_cluster(workers: Workers, needs: Needs, tell_waiting: Callable[..., None], wait_s: float) -> None:
    """Raise `ClusterError` unless a scheduler answers, after `wait_s` at most, whose workers have what the merge needs.

    tell_waiting: called with the seconds, and with what is missing where that is not a worker.
    """
    tell = partial(tell_waiting, missing="scheduler")
    with connect.opened_client(workers.scheduler, wait_s, tell) as client, explaining_loss(workers.scheduler):
        connect.wait_for_workers(client, workers.scheduler, tell_waiting)
        with noticing_loss():
            check_workers(client, workers, needs)
