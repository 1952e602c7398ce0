"""Keeping everybody else on this machine out of the clusters that are started on it.

Whoever reaches the port of a scheduler, a nanny or a worker has any code run there, as the user that it runs as, and a
port on loopback is reached by all users of a machine. Dask has no Unix sockets, and `inproc` is within a process, where
mergemill needs no Dask at all. So such clusters talk TLS (2026-11-29), with one certificate that is made for each, for
a key that is in the memory of its processes alone: `Security.temporary`, which needs `cryptography`. The `openssl`
command would do too, and is missing on many machines; what protects by default must not be optional.

Dask's pages show names, paths and logs, to a browser that has no such certificate. So they are off, unless the cluster
file asks for them by an address.
"""

from collections.abc import Collection, Mapping
from typing import Any

from mergemill.engine.recipe import ClusterFile
from mergemill.engine.runs.worker.workers import HERE

_NO_PAGES: Mapping[str, Any] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
_PAGES = ("dashboard_address", "worker_dashboard_address")  # options that ask for them
_TRANSPORTS = ("protocol", "security", "enable_tcp_over_ucx", "enable_infiniband", "enable_nvlink", "enable_rdmacm")


def make_private(options: Collection[str] = ()) -> dict[str, Any]:
    """Return the arguments of a `LocalCluster` that nobody else can use; options choose another transport, or pages."""
    from distributed.security import Security  # here: what makes a cluster's manifest needs no Dask

    given: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    if not any(name in options for name in _TRANSPORTS):
        given["security"] = Security.temporary()
    if not any(name in options for name in _PAGES):
        given["scheduler_kwargs"] = {"dashboard": False}
    return given


def serves_pages(file: ClusterFile | None) -> bool:
    """Whether the cluster of a file, or the one without a file, serves Dask's pages."""
    return file is not None and (file.kind not in HERE or any(name in file.options for name in _PAGES))


def set_pages(file: ClusterFile | None = None) -> Mapping[str, Any]:
    """Return the settings of Dask by which its HTTP servers answer nothing, where no pages are asked for."""
    return {} if serves_pages(file) else _NO_PAGES
