"""What a worker takes stays within what it was promised, also where models and output are in S3.

The base that the promise comes on top of is larger there: boto3 and a client take 25 MiB more of a process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import make_config, write_json
from runs.buckets import Place, new_place
from runs.memory import peak_bytes, reset_peak
from runs.merging import plan_merge
from safetensors.torch import save_file
from servers.s3 import S3

from mergemill.engine import run, verify
from mergemill.engine.plan.memory import task_bytes
from mergemill.engine.runs import running
from mergemill.engine.runs.clusters.cluster import Cluster
from mergemill.engine.runs.crew import Crew, open_crew
from mergemill.engine.runs.events import Event, PartFinished
from mergemill.engine.runs.outputs.chunks import BESIDE_BYTES
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.ranges import list_files

MEMORY, THREADS = 256 << 20, 2
VOCAB, HIDDEN, LAYERS = 16_384, 1024, 8  # 32 MiB of bfloat16; the others 8 MiB each
PART_BYTES = 40 << 20  # of five uploads, four of them on their way


@pytest.fixture(scope="module")
def large(seaweed_server: S3, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Three models of 100 MB."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("base", "A", "B")):
        torch.manual_seed(seed)
        tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
        tensors |= {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(4 * HIDDEN, HIDDEN) for i in range(LAYERS)}
        (folder / name).mkdir()
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / name / "model.safetensors")
        config = make_config(
            layers=LAYERS,
            hidden=HIDDEN,
            heads=16,
            kv_heads=16,
            intermediate=4 * HIDDEN,
            vocab=VOCAB,
            tied=True,
            dtype="bfloat16",
        )
        write_json(folder / name / "config.json", config)
    return new_place(seaweed_server, name="large").fill(folder)


class Watch:
    """Reads the worker's peak after each part."""

    def __init__(self, models: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pid = self.bare_bytes = self.base_bytes = self.peak_bytes = 0
        self._models = models
        monkeypatch.setattr(running, "open_crew", self._open_crew)

    @contextmanager
    def _open_crew(self, workers: Workers, *more: object) -> Iterator[Crew]:
        """Open a crew whose worker has been to S3 already: with all that this takes of a process, and no data."""
        with open_crew(workers, *more) as crew:  # type: ignore[arg-type]
            assert isinstance(crew, Cluster)
            ((self.pid, self.bare_bytes),) = crew.client.run(reset_peak).values()
            crew.client.run(list_files, f"{self._models.url}/A", "none")
            ((_, self.base_bytes),) = crew.client.run(reset_peak).values()
            yield crew

    def __call__(self, event: Event) -> None:
        if isinstance(event, PartFinished):
            self.peak_bytes = peak_bytes(self.pid)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_worker_takes_no_more_than_it_was_promised(
    method: str, seaweed: S3, large: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge(method, large.url, part_bytes=PART_BYTES)
    out, watch = new_place(seaweed), Watch(large, monkeypatch)
    run(plan, out.url, workers=1, threads=THREADS, memory=MEMORY, on_event=watch)
    taken = watch.peak_bytes - watch.base_bytes
    projected = max(task_bytes(part, Workplace(MEMORY, THREADS).share_bytes - BESIDE_BYTES) for part in plan.parts)
    base = f"base {watch.bare_bytes >> 20} MiB, with a client of S3 {watch.base_bytes >> 20} MiB"
    share = f"projected {THREADS} x {projected >> 20} MiB and uploads"
    print(f"\n{method}: {base}; taken beside it {taken >> 20} MiB of {MEMORY >> 20}; {share}")  # noqa: T201
    assert taken <= MEMORY
    assert taken > MEMORY // 4, "the promise is worth looking at"
    assert verify(out.url).parts == len(plan.parts)
