"""What this installation is: versions, native loops, extras, devices and caches, as a report of a fault needs them."""

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from mergemill.engine.runs.worker.accelerator import KINDS, count_devices
from mergemill.engine.storage.cache import default_folder
from mergemill.engine.tensors import native

LIBRARIES = ("torch", "dask", "distributed", "numpy", "safetensors", "fsspec")

_REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*;.*extra == ["']([\w-]+)["']""")


def describe_environment() -> dict[str, Any]:
    """Return what is installed and found here, as JSON values; no secret, and no name of a user's but the cache's."""
    return {
        "mergemill": version("mergemill"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        **{library: _find_version(library) for library in LIBRARIES},
        "native": describe_native(),
        "extras": find_extras(requires("mergemill") or ()),
        "devices": {"cpu": 1} | {kind: count for kind in KINDS if (count := count_devices(kind))},
        "caches": {"sources": str(default_folder())},
    }


def describe_native() -> str:
    """Say whether the loops in C are used."""
    absence = native.find_absence()
    return f"off: {absence}" if absence else "on"


def describe_slowness() -> str:
    """Say in a sentence that merges are slow here, since the loops in C are not used; empty where they are."""
    absence = native.find_absence()
    return f"the native loops are off ({absence}): merges take 3 to 15 times as long" if absence else ""


def find_extras(requirements: list[str] | tuple[()]) -> Mapping[str, Mapping[str, str | None]]:
    """Return the extras by name, and the version of each of their packages that is here; None where it is not.

    >>> find_extras(["numpy>=2.0", "no-such>=1; extra == 'x'", 'no-other[y]>=1 ; extra == "x"'])
    {'x': {'no-such': None, 'no-other': None}}
    """
    found: dict[str, dict[str, str | None]] = {}
    for name, extra in (match.groups() for match in map(_REQUIREMENT.match, requirements) if match):
        if extra != "test":
            found.setdefault(extra, {})[name] = _find_version(name)
    return found


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
