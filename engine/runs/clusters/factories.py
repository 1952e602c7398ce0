"""Dask clusters that a merge starts for itself: for each kind of a cluster file, its class and what we give it.

Options of the file stand over ours. Packages are imported where a cluster of their kind is started, and only then.
"""

import importlib
import inspect
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from mergemill.engine.errors import ClusterError
from mergemill.engine.recipe import Adaptive, ClusterFile
from mergemill.engine.recipe.faults import shorten, suggest
from mergemill.engine.runs.clusters.privacy import make_private

Arguments = dict[str, Any]

REPLACE_S = 5  # between looks for lost jobs; Dask takes distributed.deploy.lost-worker-timeout to see one

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Variables of workers: a task is one thread, whatever library it calls."""
PATIENT = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "60s",
    "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "0.9",
    "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "0.95",
}
"""Variables of workers to whom this process's settings of Dask do not come: the gate bounds what tasks hold."""


@dataclass(frozen=True, slots=True)
class Factory:
    """How clusters of a kind are started."""

    module: str  # where the class is
    name: str  # of the class
    extra: str  # that installs the module; empty where Dask brings it
    give: Callable[[ClusterFile, int], Arguments]  # our arguments, for a limit of memory in bytes
    is_open: bool = False  # whether only the class, or what is behind it, knows which options there are


def _give_local(file: ClusterFile, limit_bytes: int) -> Arguments:
    return {
        "n_workers": _start_count(file),
        "threads_per_worker": file.threads or 1,
        "memory_limit": limit_bytes,
        "silence_logs": 50,
        **make_private(file.options),
    }


def _give_ssh(file: ClusterFile, limit_bytes: int) -> Arguments:
    return {"worker_options": {"nthreads": file.threads or 1, "memory_limit": limit_bytes}}


def _give_jobqueue(file: ClusterFile, limit_bytes: int) -> Arguments:
    exports = [f"export {name}={value}" for name, value in {**ONE_THREAD, **PATIENT}.items()]
    return {
        "cores": file.threads or 1,
        "processes": 1,
        "memory": limit_bytes,
        "job_script_prologue": exports,
        "scheduler_options": {"dashboard_address": ":0"},
    }


def _give_kubernetes(file: ClusterFile, limit_bytes: int) -> Arguments:
    size = {"memory": str(limit_bytes), "cpu": str(file.threads or 1)}
    limits = {"memory": str(limit_bytes)} | ({"nvidia.com/gpu": "1"} if file.device == "cuda" else {})
    command = ["dask", "worker", "--nthreads", str(file.threads or 1), "--memory-limit", str(limit_bytes)]
    return {
        "name": f"mergemill-{secrets.token_hex(4)}",
        "n_workers": _start_count(file),
        "resources": {"requests": size, "limits": limits},
        "env": [{"name": name, "value": value} for name, value in {**ONE_THREAD, **PATIENT}.items()],
        "worker_command": command,
        "quiet": True,
    }


def _give_cuda(file: ClusterFile, limit_bytes: int) -> Arguments:
    # Without n_workers the class takes all GPUs.
    given = {**_give_local(file, limit_bytes), "n_workers": file.workers}
    return {name: value for name, value in given.items() if value is not None}


def _give_count(file: ClusterFile, limit_bytes: int) -> Arguments:
    return {"n_workers": _start_count(file)}


def _give_coiled(file: ClusterFile, limit_bytes: int) -> Arguments:
    return {
        "name": f"mergemill-{secrets.token_hex(4)}",
        "n_workers": _start_count(file),
        "worker_options": {"nthreads": file.threads or 1},
        "environ": {**ONE_THREAD, **PATIENT},
    }


def _give_nothing(file: ClusterFile, limit_bytes: int) -> Arguments:
    return {}


def _jobqueue(name: str) -> Factory:
    return Factory("dask_jobqueue", name, "jobqueue", _give_jobqueue)


FACTORIES: Mapping[str, Factory] = {
    "local": Factory("distributed", "LocalCluster", "", _give_local),
    "ssh": Factory("distributed", "SSHCluster", "ssh", _give_ssh),
    "slurm": _jobqueue("SLURMCluster"),
    "pbs": _jobqueue("PBSCluster"),
    "lsf": _jobqueue("LSFCluster"),
    "sge": _jobqueue("SGECluster"),
    "kubernetes": Factory("dask_kubernetes.operator", "KubeCluster", "kubernetes", _give_kubernetes),
    "gateway": Factory("dask_gateway", "GatewayCluster", "gateway", _give_nothing, is_open=True),
    "cuda": Factory("dask_cuda", "LocalCUDACluster", "cuda", _give_cuda),
    "cloudprovider": Factory("dask_cloudprovider", "", "cloudprovider", _give_count),  # the class is an option
    "coiled": Factory("coiled", "Cluster", "coiled", _give_coiled),
}


@contextmanager
def start_cluster(file: ClusterFile, limit_bytes: int) -> Iterator[Any]:
    """Start a cluster, and stop it when the block ends; `ClusterError` where it cannot be started.

    limit_bytes: of each worker's memory, for Dask and for the system that runs it.
    """
    where, factory = file.name or file.kind, FACTORIES[file.kind]
    cls = _find_class(file, factory, where)
    arguments = make_arguments(file, limit_bytes)
    if not factory.is_open:
        _check_options(file, cls, where)
    try:
        cluster = cls(**arguments)
    except Exception as error:  # whatever the class of another package says
        raise _say_failure(cls, error, where) from error
    with cluster:
        try:
            _scale(cluster, file, started="n_workers" in arguments)
        except Exception as error:
            raise _say_failure(cls, error, where) from error
        with _replacing_lost_jobs(cluster) if factory.extra == "jobqueue" else nullcontext():
            yield cluster


def make_arguments(file: ClusterFile, limit_bytes: int) -> Arguments:
    """Return the arguments of the cluster's class: ours, and over them the file's options."""
    ours, theirs = FACTORIES[file.kind].give(file, limit_bytes), file.options.thaw()
    theirs.pop("provider", None) if file.kind == "cloudprovider" else None
    return {**ours, **{name: _join(name, ours.get(name), value) for name, value in theirs.items()}}


def _join(name: str, ours: Any, theirs: Any) -> Any:
    """Return both, where an argument is a collection; else theirs."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and name != "resources":
        return {**ours, **theirs}
    if name == "env" and isinstance(theirs, dict):  # of Kubernetes, which takes both forms
        theirs = [{"name": key, "value": value} for key, value in theirs.items()]
    return ours + theirs if name in ("env", "job_script_prologue") and ours is not None else theirs


def _find_class(file: ClusterFile, factory: Factory, where: str) -> Any:
    """Return the cluster's class, or the function that makes one."""
    module, name = factory.module, factory.name
    if file.kind == "cloudprovider":
        below, name = str(file.options["provider"]).split(".")
        module = f"{module}.{below}"
    try:
        if factory.extra == "ssh":
            importlib.import_module("asyncssh")
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        missing = error.name or str(error)
        raise ClusterError(
            f"{where}: kind {file.kind}: {missing} is not installed; install mergemill[{factory.extra}]"
        ) from error
    if found is None:
        raise ClusterError(f"{where}: kind {file.kind}: {module} has no class {name}")
    return found


def _check_options(file: ClusterFile, cls: Any, where: str) -> None:
    """Raise `ClusterError` for an option that the class does not have."""
    known = _list_arguments(cls)
    if file.kind in ("local", "cuda"):  # what is left over they hand to each worker
        from distributed import Nanny

        known |= _list_arguments(Nanny)
    if file.kind == "cloudprovider":
        known.add("provider")
    for name in file.options:
        if name not in known:
            raise ClusterError(
                f"{where}: options: {cls.__name__} takes no {shorten(name)!r}; {suggest(name, sorted(known))}"
            )


def _list_arguments(cls: Any) -> set[str]:
    """Return the names of the arguments of a class, with those of the classes that it builds on."""
    if not inspect.isclass(cls):
        return {*inspect.signature(cls).parameters} - {"kwargs"}
    takers = [vars(each)["__init__"] for each in cls.__mro__[:-1] if "__init__" in vars(each)]
    named = {
        parameter.name
        for taker in takers
        for parameter in inspect.signature(taker).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    jobs = getattr(cls, "job_cls", None)  # of dask-jobqueue: what describes a job
    return (named | (_list_arguments(jobs) if jobs else set())) - {"self"}


def _scale(cluster: Any, file: ClusterFile, *, started: bool) -> None:
    """Have the first workers started, and from then on as many as there is work for, where the file says so."""
    if not started and file.kind != "ssh":
        count = _start_count(file)
        cluster.sync(_submit, cluster, count) if FACTORIES[file.kind].extra == "jobqueue" else cluster.scale(count)
    if isinstance(file.workers, Adaptive):
        cluster.adapt(minimum=file.workers.minimum, maximum=file.workers.maximum)


async def _submit(cluster: Any, workers: int) -> None:
    """Submit jobs for so many workers. `scale` does it later, and nobody would see that a job was refused."""
    while len(cluster.plan) < workers:
        cluster.worker_spec.update(cluster.new_worker_spec())
    try:
        await cluster._correct_state()
    except RuntimeError:
        cluster._created.clear()  # a refused job never ran, and Dask insists that what it made has ended
        raise


@contextmanager
def _replacing_lost_jobs(cluster: Any) -> Iterator[None]:
    """Have another job submitted for each that ended; Dask forgets it, and submits one only when it scales."""
    from tornado.ioloop import PeriodicCallback

    look = PeriodicCallback(cluster._correct_state, 1000 * REPLACE_S)
    cluster.loop.add_callback(look.start)
    try:
        yield
    finally:
        cluster.loop.add_callback(look.stop)


def _start_count(file: ClusterFile) -> int | None:
    """Return how many workers are asked for at the start: one at least, so that it shows whether that works."""
    return max(1, file.workers.minimum) if isinstance(file.workers, Adaptive) else file.workers


def _say_failure(cls: Any, error: Exception, where: str) -> ClusterError:
    words = " ".join(str(error).split()) or type(error).__name__
    return ClusterError(f"{where}: {cls.__name__} could not be started: {words}")
