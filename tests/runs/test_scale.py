"""Large shapes on real worker processes: sparse files far away, and an output that counts bytes and drops them.

`tests/bench/scale.py` does the same with all of a 70B model, and with eight workers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dask
import pytest
from bench import drop
from bench.watch import Watch
from dask.delayed import delayed
from models import llama_shapes
from plan.sketches import config, plan_of, write_sketch

from mergemill.engine import run
from mergemill.engine.runs.clusters.cluster import open_cluster
from mergemill.engine.runs.worker.workers import Workers

HIDDEN, KV, FFN, VOCAB = 8192, 1024, 28_672, 16_032  # of Llama 3 70B, but for an eighth of its vocabulary
LATENCY_MS = 30
WORKERS, MEMORY = 2, 1 << 30


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Two models of one layer of 70B, 2 GB each, as holes."""
    shapes = llama_shapes(layers=1, hidden=HIDDEN, kv_size=KV, intermediate=FFN, vocab=VOCAB, tied=True)
    for name in ("A", "B"):
        tensors = {tensor: ("BF16", shape) for tensor, shape in shapes.items()}
        write_sketch(tmp_path / name, tensors, config=config(layers=1, tied=True), shards=2)
    return tmp_path


@pytest.fixture
def dropping() -> Iterator[None]:
    """Outputs at ``drop://``, and workers that know ``far://``."""
    with drop.settings() as settings, dask.config.set(settings):
        yield


def make_recipe_of(place: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    models = [{"model": f"{place}/{name}", "parameters": {"weight": 0.5}} for name in ("A", "B")]
    return {"merge_method": "linear", "models": models, "storage_options": {"far": options}}


@pytest.mark.slow
@pytest.mark.usefixtures("dropping")
def test_a_layer_of_70b_from_far_away_takes_no_more_memory_than_was_promised(models: Path) -> None:
    counts, out, watch = models / "counts", models / "out", Watch()
    plan = plan_of(make_recipe_of(f"far://{models}", {"latency_ms": LATENCY_MS, "counts": str(counts)}))
    assert len(plan.parts) > 4 * WORKERS
    done = run(plan, f"drop://{out}", workers=WORKERS, threads=1, memory=MEMORY, on_event=watch)
    taken = list(watch.taken_bytes.values())
    reads, dropped = drop.read_counts(counts, "read"), drop.read_counts(out / "counts", "drop")
    most = max(each["most_in_flight"] for each in reads)
    print(f"\ntaken {[size >> 20 for size in taken]} MiB of {MEMORY >> 20}, {most} reads in flight")  # noqa: T201
    assert 1 <= len(taken) <= WORKERS  # without one that ended on the way, which is replaced
    assert 16 << 20 < max(taken) <= MEMORY
    assert most > 4, "the latency is met by reading ahead"
    assert sum(each["bytes"] for each in dropped) == sum(part.size_bytes for part in plan.parts)
    assert sum(each["calls"] for each in dropped) == len(plan.parts) == done.parts
    assert done.read_bytes == 2 * sum(part.size_bytes for part in plan.parts)
    assert (out / "model.safetensors.index.json").exists()


def test_a_graph_of_many_megabytes_brings_no_warning_of_dasks() -> None:
    """A merge of 10,000 parts is 20 MB of specifications; here warnings are errors."""
    spec = bytes(2 << 20)
    sizes: list[int] = []
    with open_cluster(Workers(1, 1, 256 << 20)) as cluster:
        tasks = [delayed(len, pure=False)(spec, dask_key_name=f"measure-{number}") for number in range(8)]
        cluster.run_tasks(tasks, sizes.append)
    assert sizes == [len(spec)] * 8
