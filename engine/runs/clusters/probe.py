"""What is asked of workers before a merge. It travels as source, since a worker may lack this package: stdlib only."""

from typing import Any


def look_around(files: dict[str, int], device: str = "cpu", dask_worker: Any = None) -> dict[str, Any]:
    """Return what is installed here, by name (None: is not), and what of `files` (sizes by path) is not as said.

    And what is wrong with its `device`: empty where there is one, as torch calls it.
    ``limit_bytes`` is what Dask lets the process take before it pauses or ends it; 0 where there is no limit.
    """
    import importlib.metadata
    import platform
    import socket
    from pathlib import Path

    def find_version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def find_fault(path: str, size_bytes: int) -> str:
        try:
            found = Path(path).stat().st_size
        except OSError as error:
            return str(error.strerror)
        return "" if found == size_bytes else f"has {found} bytes, not {size_bytes}"

    def find_device_fault() -> str:
        if device == "cpu" or find_version("torch") is None:
            return ""
        import torch

        there = torch.backends.mps.is_available() if device == "mps" else getattr(torch, device).is_available()
        return "" if there else f"no {device} device"

    def find_limit() -> int:
        import dask.config

        memory = getattr(dask_worker, "memory_manager", None)
        if memory is None or not memory.memory_limit:
            return 0
        shares = memory.memory_pause_fraction, dask.config.get("distributed.worker.memory.terminate")
        return int(memory.memory_limit * min(float(share or 1) for share in shares))

    faults = {path: find_fault(path, size_bytes) for path, size_bytes in files.items()}
    versions = {name: find_version(name) for name in ("mergemill", "torch")}
    return {
        "host": socket.gethostname(),
        "versions": {"Python": ".".join(platform.python_version_tuple()[:2]), **versions},
        "device": find_device_fault(),
        "faults": {path: fault for path, fault in faults.items() if fault},
        "limit_bytes": find_limit(),
    }


def read_settings(dask_scheduler: Any = None) -> dict[str, float]:
    """Return the scheduler's settings that matter to a merge."""
    return {
        "worker-saturation": float(dask_scheduler.WORKER_SATURATION),
        "allowed-failures": float(dask_scheduler.allowed_failures),
        "worker-ttl": float(dask_scheduler.worker_ttl or "inf"),
    }


def has_module(name: str) -> bool:
    """Whether a module is installed there."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def list_left_plugins(prefix: str, dask_scheduler: Any = None) -> list[str]:
    """Return the worker plugins whose names begin so, and end with the id of a client that is gone."""
    names = [name for name in dask_scheduler.worker_plugins if name.startswith(prefix) and "-Client-" in name]
    return [name for name in names if not any(name.endswith(client) for client in dask_scheduler.clients)]
