"""What the command line says of workers, as the engine takes it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergemill.engine import values


def make_crew(
    *,
    workers: int | None,
    threads: int | None = None,
    memory: str | None,
    scheduler: str | None = None,
    wait: float = 0.0,
    cluster: str | None = None,
    storage_as: str | None = None,
    cache: str | None = None,
    cache_folder: str | None = None,
    reader: str | None = None,
) -> "values.WorkerKeywords":
    """Return the options that commands share as keywords; storage is reached as one file says, or as the cluster's."""
    from mergemill.engine import load_cluster

    file = load_cluster(cluster) if cluster else None
    store = load_cluster(storage_as) if storage_as else file
    return {
        "workers": workers,
        "threads": threads,
        "memory": memory,
        "scheduler": scheduler,
        "wait_s": wait,
        "cluster": file,
        "cache": cache,
        "cache_folder": cache_folder,
        "storage": store.storage if store else None,
        "reader": reader,
    }
