"""The promise holds on workers that somebody else has started, with flags that nobody here would choose.

As in `test_memory_promise.py` the kernel says what they took. Beside the promise a worker may take what Python, Dask
and torch themselves take, `PROCESS_BYTES`, also where a task is the first to load torch.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import start_cluster
from distributed import Client
from runs.large import lend_models
from runs.memory import look_at_process, peak_bytes
from runs.merging import make_recipe_of

from mergemill.engine import make_plan, run
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.clusters.preflight import PROCESS_BYTES
from mergemill.engine.runs.events import Event, PartFinished

VOCAB, LAYERS, THREADS = 32_768, 8, 4  # an embedding of 256 MiB, matrices of 30 MiB
MEMORY = 96 << 20  # little for so many threads: tasks wait for each other
DISK_BYTES = 4 << 30
FLAGS = ("--nthreads", str(THREADS), "--memory-limit", "0")
NATIVE: dict[str, dict[str, float]] = {
    "ties": {"weight": 0.5, "density": 0.3},
}
TORCH: dict[str, dict[str, float]] = {"widen": {}}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three models of half a GiB; removed afterwards."""
    folder = tmp_path_factory.mktemp("large")
    with lend_models(folder, vocab=VOCAB, layers=LAYERS, disk_bytes=DISK_BYTES) as models:
        yield models


def plan_large(method: str, folder: Path) -> Plan:
    models = [{"model": str(folder / name), "parameters": {**NATIVE, **TORCH}[method]} for name in "AB"]
    recipe = {"merge_method": method, "base_model": str(folder / "base"), "models": models}
    return make_plan(make_recipe_of(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("nanny", [False, True], ids=["no-nanny", "nanny"])
@pytest.mark.parametrize("method", [*NATIVE, *TORCH])
def test_workers_of_somebody_else_keep_the_promise(nanny: bool, method: str, large: Path, tmp_path: Path) -> None:
    plan = plan_large(method, large)
    seen: list[dict[str, Any]] = []
    peaks: dict[int, int] = {}
    with start_cluster(tmp_path, *FLAGS, nanny=nanny) as own, Client(own.address, set_as_default=False) as client:
        before = {pid: peak_bytes(pid) for pid in client.run(os.getpid).values()}

        def look(event: Event) -> None:
            if isinstance(event, PartFinished):
                peaks.update((pid, peak_bytes(pid)) for pid in before)
                if not seen or event.parts_done == len(plan.parts):
                    seen.extend(client.run(look_at_process).values())

        run(plan, tmp_path / "out", scheduler=own.address, memory=MEMORY, on_event=look)
    shutil.rmtree(tmp_path / "out")
    mib = [(before[pid] >> 20, peaks[pid] - before[pid] >> 20) for pid in before]
    print(f"\n{method}: before and taken {mib} MiB, {seen[-1]}")  # noqa: T201 - shown by pytest -s
    assert len(peaks) == 2
    assert all(peaks[pid] <= PROCESS_BYTES + MEMORY for pid in before)
    if method in NATIVE:
        assert all(peaks[pid] <= before[pid] + MEMORY for pid in before)
    assert {worker["mapped"] for worker in seen} == {(False, True)}
    assert {worker["torch"] for worker in seen} <= {None, 1}
    assert any(worker["torch"] for worker in seen) == (method in TORCH)
