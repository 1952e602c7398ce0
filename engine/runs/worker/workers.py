"""How many workers a merge gets, of what, and what each is given."""

from dataclasses import dataclass, replace
from pathlib import Path

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.memory import check_device_memory
from mergemill.engine.plan.sizes import parse_size
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import ClusterFile, load_cluster
from mergemill.engine.runs.worker.accelerator import choose_device, count_devices
from mergemill.engine.storage import system
from mergemill.engine.storage.cache import CacheOptions
from mergemill.engine.storage.store import ENVIRONMENT, Options, Storage, join_options, make_storage

MEMORY = "1GiB"
SMALL_BYTES = 4 << 30  # merges that write less than this run as threads of this process
HERE = ("local", "cuda")  # kinds of cluster files
DEVICE_MEMORY = "4GiB"  # of a card of 8 GB, with room for what is CUDA's own
DEVICE_THREADS = 2  # of a worker with a device: one reads and writes while the other has it work
FEW_CORES = 4  # so do, on so many, merges by native loops: their threads hardly wait for the interpreter
MOST_PER_CORE = 4  # processes, of a core: each is one of Python with torch in it


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers there are, and what each is given."""

    processes: int  # 0: one worker, of threads of this process
    threads: int  # of each worker
    memory_bytes: int  # promised to each worker
    scheduler: str = ""  # of a cluster that is there already: its address, or its file; the others are then its own
    cluster: ClusterFile | None = None  # that is started for the merge; it may have fewer processes than that, and 0
    device: str = "cpu"  # that each merges on
    device_memory_bytes: int = 0  # promised to each worker, of its device
    cache: CacheOptions | None = None  # of each host, for what is read from afar
    storage: Storage = ENVIRONMENT  # how they reach it

    @property
    def count(self) -> int:
        """The number of workers."""
        return max(1, self.processes)

    @property
    def are_threads(self) -> bool:
        """Whether they are threads of this process."""
        return not self.processes and not self.scheduler and self.cluster is None

    @property
    def name(self) -> str:
        """What their user calls the cluster."""
        return self.scheduler or (self.cluster.name or self.cluster.kind if self.cluster else "the cluster")

    @property
    def is_here(self) -> bool:
        """Whether all workers are on this machine."""
        return not self.scheduler and (self.cluster is None or self.cluster.kind in HERE)


def find_storage(plan: Plan, workers: Workers, storage: Options | None = None) -> Storage:
    """Return how storage is reached: by the recipe's options, and beside them `storage`, or the cluster file's."""
    if storage is None:
        storage = workers.cluster.storage if workers.cluster else {}
    return make_storage(join_options(storage, plan.storage))


def choose_workers(
    plan: Plan,
    *,
    workers: int | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    scheduler: str | None = None,
    cluster: str | Path | ClusterFile | None = None,
    device: str | None = None,
    device_memory: str | int = DEVICE_MEMORY,
) -> Workers:
    """Return the workers of a merge: on this machine, of a Dask cluster that is there already, or of a new one.

    workers: processes; 0 means threads of this process; None chooses, by the size of the merge. threads: of each
    worker; None is one a process, or as many as there are cores. memory: promised to each worker; None is what the
    cluster file says, or 1 GiB. scheduler: the cluster's address, such as ``tcp://10.0.0.1:8786``, or the path of its
    scheduler file. cluster: a cluster file, or the name of one that is built in. device: what each merges
    on: ``cpu``, ``cuda``, ``xpu``, ``mps``, or ``auto``; None is what the cluster file says, or the CPU.
    device_memory: of it, promised to each worker. On this machine each GPU has a worker process of its own, or one GPU
    this process.
    """
    if device is None:
        file = load_cluster(cluster) if isinstance(cluster, str | Path) else cluster
        device = (file.device if file else None) or "cpu"
    chosen = _choose_places(plan, workers=workers, threads=threads, memory=memory, scheduler=scheduler, cluster=cluster)
    if device == "cpu":
        return chosen
    kind = choose_device(device, plan, here=chosen.is_here)
    chosen = replace(chosen, device=kind)
    if kind == "cpu":
        return chosen
    memory_bytes = parse_size(device_memory, what="--device-memory")
    check_device_memory(plan.parts, kind, memory_bytes)
    chosen = replace(chosen, device_memory_bytes=memory_bytes)
    if scheduler or cluster is not None:
        return chosen
    return _share_devices(chosen, count_devices(kind), workers, threads)


def _share_devices(chosen: Workers, devices: int, workers: int | None, threads: int | None) -> Workers:
    """Return a worker for each of the devices of this machine, or as many as were asked for."""
    wanted = (devices if devices > 1 else 0) if workers is None else workers
    if wanted > devices:
        raise PlanError(f"--workers {wanted}: a worker has a {chosen.device} device of its own, and here are {devices}")
    return replace(chosen, processes=wanted, threads=threads or DEVICE_THREADS)


def _choose_places(
    plan: Plan,
    *,
    workers: int | None,
    threads: int | None,
    memory: str | int | None,
    scheduler: str | None,
    cluster: str | Path | ClusterFile | None,
) -> Workers:
    """Return where the workers are, and what each has of its machine."""
    if cluster is not None:
        return _choose_cluster(cluster, memory, workers=workers, threads=threads, scheduler=scheduler)
    memory = MEMORY if memory is None else memory
    if scheduler:
        if workers is not None or threads is not None:
            raise PlanError(f"{scheduler}: has workers and threads of its own; leave out --workers and --threads")
        return Workers(0, 1, parse_size(memory, what="--memory"), scheduler)
    cores = system.count_cores()
    if workers is None:
        alone = cores == 1 or plan.write_bytes < SMALL_BYTES or (cores <= FEW_CORES and _is_native(plan))
        workers = 0 if threads is not None or alone else cores
    most = MOST_PER_CORE * cores
    if workers > most:
        raise PlanError(
            f"--workers {workers}: this process may use {cores} of this machine's cores; give at most {most}, "
            f"or a cluster file of kind local, which is taken at its word"
        )
    return Workers(workers, threads or (1 if workers else cores), parse_size(memory, what="--memory"))


def _choose_cluster(
    cluster: str | Path | ClusterFile,
    memory: str | int | None,
    *,
    workers: int | None,
    threads: int | None,
    scheduler: str | None,
) -> Workers:
    """Return the workers of a cluster that is to be started."""
    file = cluster if isinstance(cluster, ClusterFile) else load_cluster(cluster)
    name = file.name or file.kind
    if scheduler:
        raise PlanError(f"{name}: is started for the merge, and {scheduler} is there already; give one of the two")
    if workers is not None or threads is not None:
        raise PlanError(f"{name}: says itself how many workers and threads; leave out --workers and --threads")
    if memory is None and file.memory is not None:
        memory_bytes = parse_size(file.memory, what=f"{name}: memory")
    else:
        memory_bytes = parse_size(MEMORY if memory is None else memory, what="--memory")
    return Workers(file.count, file.threads or 1, memory_bytes, cluster=file)


def _is_native(plan: Plan) -> bool:
    """Whether native loops do all the merging."""
    tensors = (piece.tensor for part in plan.parts for piece in part.pieces)
    return all(tensor.expression.makes_natively(tensor.dtype) for tensor in tensors)
