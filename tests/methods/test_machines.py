"""The same bytes on every machine: however wide its vector registers are, with the native loops or without them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.suite import ENTRIES
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

PATHS = [path for path in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if path]
NUMPY_FEATURES = " ".join(name for name in __cpu_dispatch__ if __cpu_features__[name])
NARROW = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",  # what torch's exp and log are made of does not ask ATen
    "NPY_DISABLE_CPU_FEATURES": NUMPY_FEATURES,
    "OMP_NUM_THREADS": "1",
    "MERGEMILL_NATIVE": "0",
}
# Torch believes what it is told, and would end with an illegal instruction on a machine that has less.
WIDER = {"AVX512": ("avx2", "avx512"), "AVX2": ("avx2",)}.get(torch.backends.cpu.get_cpu_capability(), ())
MACHINES = {"default": NARROW} | {name: {"ATEN_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"} for name in WIDER}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script says on each machine; they run at the same time."""
    script, running = Path(__file__).with_name("merge_everything.py"), {}
    for name, changes in MACHINES.items():
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(PATHS),
            **{key: value for key, value in changes.items() if value},
        }
        folder = tmp_path_factory.mktemp("machine")
        command = [sys.executable, str(script), str(folder)]
        running[name] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    reports = {}
    for name, process in running.items():
        printed, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
        reports[name] = json.loads(printed)
    return reports


def test_the_machines_differ(reports: dict[str, Any]) -> None:
    assert [reports[name]["capability"].lower() for name in MACHINES] == list(MACHINES)
    merged = {key.split("-")[0] for key in reports["default"]["sums"]}
    assert {name for name, entry in ENTRIES.items() if entry.everywhere} <= merged


@pytest.mark.parametrize("name", WIDER)
def test_wider_registers_write_the_same_bytes(reports: dict[str, Any], name: str) -> None:
    narrow, wide = reports["default"]["sums"], reports[name]["sums"]
    differing = [key for key in narrow if narrow[key] != wide[key]]
    assert differing == []
