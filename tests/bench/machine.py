"""The machine that measures, in words."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil
from programs import PYTHON_VARIABLE, find_missing

OURS = ("mergemill", "torch", "dask", "numpy")
THEIRS = ("mergekit", "torch", "safetensors")


def describe_machine(folder: Path) -> dict[str, str]:
    """Return what a reader must know of the machine; folder: where the models lie."""
    found = {
        "processor": f"{find_processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "file system": find_file_system(folder),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mergemill's": ", ".join(f"{name} {version(name)}" for name in OURS),
    }
    return found | ({} if find_missing("mergekit") else {"mergekit's": find_versions(os.environ[PYTHON_VARIABLE])})


def find_processor() -> str:
    """Return the processor's name, and whether it has the wide vectors that kernels gain from."""
    lines = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    flags = lines.get("flags", "").split()
    wide = next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in flags), "")
    return f"{lines.get('model name', platform.machine())}{', ' + wide if wide else ''}"


def find_file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is on."""
    mounts = [one for one in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(one.mountpoint)]
    return max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else "unknown"


def find_versions(python: str) -> str:
    """Ask another environment for the versions of its packages."""
    script = f"import json; from importlib.metadata import version as v; print(json.dumps([v(n) for n in {THEIRS}]))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return ", ".join(f"{name} {found}" for name, found in zip(THEIRS, json.loads(done.stdout), strict=True))
