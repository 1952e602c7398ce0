"""What workers take stays within what they were promised: a 1 GiB embedding under 512 MiB, measured by the kernel.

The tensors beside the embedding are as large as parts get, so that threads keep their inputs between two passes and
fill the promise.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from runs.large import lend_models
from runs.memory import peak_bytes

from mergemill.engine import make_plan, run
from mergemill.engine.plan.memory import stream_bytes, task_bytes
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.runs.events import Event, PartFinished, Started
from mergemill.engine.runs.worker.workplace import MALLOC_BYTES, Workplace

VOCAB, LAYERS = 131_072, 8  # an embedding of 1 GiB
MEMORY = 512 << 20
WORKERS, THREADS = 2, 4
DISK_BYTES = 7 << 30

LINES = {
    "linear": "models: [{model: {A}, parameters: {weight: 0.3}}, {model: {B}, parameters: {weight: 0.7}}]",
    "slerp": "base_model: {base}\nmodels: [{model: {base}}, {model: {A}}]\nparameters: {t: 0.4}",
    "task_arithmetic": "base_model: {base}\nmodels: [{model: {A}}, {model: {B}}]\nparameters: {weight: 0.5}",
    "ties": "base_model: {base}\nmodels: [{model: {A}}, {model: {B}}]\n"
    "parameters: {weight: 0.5, density: 0.3, rescale: true}",
    "dare_linear": "base_model: {base}\nmodels: [{model: {A}}, {model: {B}}]\nparameters: {weight: 0.5, density: 0.5}",
    "dare_ties": "base_model: {base}\nmodels: [{model: {A}}, {model: {B}}]\nparameters: {weight: 0.5, density: 0.5}",
    "passthrough": "models: [{model: {A}}]",
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three models with a 1 GiB embedding each; removed afterwards."""
    folder = tmp_path_factory.mktemp("large")
    with lend_models(folder, vocab=VOCAB, layers=LAYERS, disk_bytes=DISK_BYTES) as models:
        yield models


def make_large_plan(method: str, folder: Path) -> Plan:
    lines = LINES[method]
    for name in ("base", "A", "B"):
        lines = lines.replace(f"{{{name}}}", str(folder / name))
    return make_plan(parse_recipe(f"merge_method: {method}\n{lines}\n", name="large.yml"))


class Watch:
    """Reads each worker's peak: before the first task, and after each part."""

    def __init__(self) -> None:
        self.base: dict[int, int] = {}
        self.peak: dict[int, int] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            children = psutil.Process().children(recursive=True)
            pids = [p.pid for p in children if any("spawn_main" in word for word in p.cmdline())]
            self.base = {pid: peak_bytes(pid) for pid in pids}
        if isinstance(event, PartFinished):
            self.peak = {pid: peak_bytes(pid) for pid in self.base}


@pytest.mark.slow
@pytest.mark.parametrize("method", LINES)
def test_a_worker_takes_no_more_than_it_was_promised(method: str, large: Path, tmp_path: Path) -> None:
    plan = make_large_plan(method, large)
    embedding = sum(part.size_bytes for part in plan.parts if "embed" in part.pieces[0].tensor.name)
    assert embedding >= 1 << 30
    watch = Watch()
    out = tmp_path / "out"
    committed = run(plan, out, workers=WORKERS, threads=THREADS, memory=MEMORY, on_event=watch)
    shutil.rmtree(out)
    assert len(watch.base) == WORKERS
    taken = [watch.peak[pid] - watch.base[pid] for pid in watch.base]
    projected = THREADS * max(task_bytes(part, Workplace(MEMORY, THREADS).share_bytes) for part in plan.parts)
    base = [size >> 20 for size in watch.base.values()]
    print(  # noqa: T201 - shown by pytest -s
        f"\n{method}: base {base} MiB, taken beside it {[size >> 20 for size in taken]} MiB of {MEMORY >> 20}, "
        f"projected {projected >> 20} MiB, {committed.seconds:.0f} s"
    )
    assert max(taken) <= MEMORY
    assert max(taken) <= projected + THREADS * MALLOC_BYTES  # far below the promise, for what streams


@pytest.mark.slow
def test_a_promise_that_kept_inputs_fill_is_kept(large: Path, tmp_path: Path) -> None:
    """What malloc holds beside the arenas has its room, also where the arenas could take all that was promised."""
    plan = make_large_plan("slerp", large)
    kept = max(piece.projected.keep_bytes for part in plan.parts for piece in part.pieces if piece.whole)
    memory = THREADS * (kept + MALLOC_BYTES)
    assert Workplace(memory, THREADS).share_bytes >= kept > stream_bytes(plan.parts[0])
    watch = Watch()
    run(plan, tmp_path / "out", workers=1, threads=THREADS, memory=memory, on_event=watch)
    shutil.rmtree(tmp_path / "out")
    ((base, peak),) = ((watch.base[pid], watch.peak[pid]) for pid in watch.base)
    print(f"\nslerp: taken {(peak - base) >> 20} MiB of {memory >> 20}")  # noqa: T201
    assert kept < peak - base <= memory  # whether all threads are full at one moment is chance
