"""What a merge is asked of its workers: one value, and the same as keywords."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from mergemill.engine.recipe import ClusterFile, load_cluster
from mergemill.engine.storage.store import EVERY, READER, Options, join_options

DEVICE_MEMORY = "4GiB"  # of a card of 8 GB, with room for what is CUDA's own


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """The workers of a merge: on this machine, of a Dask cluster that is there already, or of a new one.

    workers: processes; 0 means threads of this process; None chooses, by the size of the merge. threads: of each
    worker; None is one a process, or as many as there are cores. memory: promised to each worker; None is what the
    cluster file says, or 1 GiB.

    scheduler: the cluster's address, such as ``tcp://10.0.0.1:8786``, or the path of its scheduler file. wait_s: how
    long one is waited for that does not answer yet. cluster: a cluster file, or the name of one that is built in. All
    workers of a cluster must see the inputs and the output at the same paths.

    device: what each merges on: ``cpu``, ``cuda``, ``xpu``, ``mps``, or ``auto``; None is what the cluster file says,
    or the CPU. device_memory: of it, promised to each worker. On this machine each GPU has a worker process of its own,
    or one GPU this process.

    cache: the most bytes of remote sources that each host keeps on a local disk for later merges, such as ``"50GB"``;
    None keeps none. cache_folder: where; None is ``~/.cache/mergemill``. storage: options of storage by scheme; None is
    the cluster file's; a recipe's are stronger. reader: how slices are read, ``direct`` or, slower and plainly,
    ``fsspec``; None is what ``storage`` says, or MERGEMILL_READER.
    """

    workers: int | None = None
    threads: int | None = None
    memory: str | int | None = None
    scheduler: str | None = None
    wait_s: float = 0.0
    cluster: str | Path | ClusterFile | None = None
    device: str | None = None
    device_memory: str | int = DEVICE_MEMORY
    cache: str | int | None = None
    cache_folder: str | Path | None = None
    storage: Options | None = None
    reader: str | None = None

    def find_cluster(self) -> ClusterFile | None:
        """Return the cluster file, read where it is named; None where there is none."""
        return load_cluster(self.cluster) if isinstance(self.cluster, str | Path) else self.cluster

    def find_storage(self) -> Options:
        """Return the options of storage that stand beside a recipe's."""
        file = self.find_cluster() if self.storage is None else None
        options = self.storage or (file.storage if file else {})
        return join_options(options, {EVERY: {READER: self.reader}}) if self.reader else options


class WorkerKeywords(TypedDict, total=False):
    """`WorkerOptions` as keywords of a function."""

    workers: int | None
    threads: int | None
    memory: str | int | None
    scheduler: str | None
    wait_s: float
    cluster: str | Path | ClusterFile | None
    device: str | None
    device_memory: str | int
    cache: str | int | None
    cache_folder: str | Path | None
    storage: Options | None
    reader: str | None
