"""A plan of a 70B model: seconds, a few megabytes, headers only; and of a mixture of experts: within a minute."""

import os
import time
from pathlib import Path

import pytest
from bench.mixtures import FINE, list_experts, make_mixture_config
from models import llama_shapes
from plan.sketches import config, list_tensors, plan_of, write_sketch

from mergemill.engine import describe_plan
from mergemill.engine.runs.graph import make_tasks
from mergemill.engine.runs.outputs.record import make_record
from mergemill.engine.runs.outputs.target import FileTarget
from mergemill.engine.storage import system
from mergemill.engine.storage.store import ENVIRONMENT

LAYERS, HIDDEN, KV, FFN, VOCAB = 80, 8192, 1024, 28_672, 128_256


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with the names, shapes and 30 shards of Llama 3 70B, as holes of 141 GB each."""
    shapes = llama_shapes(layers=LAYERS, hidden=HIDDEN, kv_size=KV, intermediate=FFN, vocab=VOCAB, tied=False)
    folder = tmp_path_factory.mktemp("large")
    for name in ("base", "chat"):
        tensors = {tensor: ("BF16", shape) for tensor, shape in shapes.items()}
        write_sketch(folder / name, tensors, config=config(layers=LAYERS), shards=30)
    return folder


def test_a_70b_is_planned_in_seconds_without_reading_a_weight(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = 0

    def count(number: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read_bytes
        read_bytes += sum(map(len, buffers))
        return preadv(number, buffers, offset)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", count)
    monkeypatch.chdir(zoo)
    started = time.process_time()
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "chat"}]}
    plan = plan_of(recipe | {"parameters": {"weight": 1, "density": [0.2, 0.8]}})
    found = describe_plan(plan, memory="512MiB")
    assert time.process_time() - started < 8
    headers = sum(8 + read_length(path) for path in zoo.rglob("*.safetensors"))
    assert headers <= read_bytes <= headers + 60 * (1 << 16)  # a header may be read with what follows it
    assert found["tensors"] == 723
    assert found["write_bytes"] - sum(len(shard.header) for shard in plan.shards) == 141_107_412_992
    assert found["read_bytes"] == 2 * 141_107_412_992
    assert len(plan.shards) == pytest.approx(29, abs=1)
    assert 1000 < len(plan.parts) < 2000
    assert found["projected_bytes"] <= 512 << 20
    assert len(list_tensors(plan)) == 723


def test_671b_in_small_experts_are_planned_within_a_minute_as_ten_thousand_tasks(tmp_path: Path) -> None:
    tensors = {name: ("BF16", shape) for name, shape in list_experts(FINE).items()}
    for name in ("A", "B"):
        write_sketch(tmp_path / name, tensors, config=make_mixture_config(FINE), shards=163)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("A", "B")]
    started = time.process_time()
    plan = plan_of({"merge_method": "linear", "models": models})
    assert time.process_time() - started < 60
    assert len(list_tensors(plan)) == len(tensors) == 89_939
    assert 1.3e12 < plan.write_bytes < 1.4e12
    assert 9000 < len(plan.parts) < 12_000
    assert max(part.size_bytes for part in plan.parts) <= 128 << 20
    started = time.process_time()
    tasks = make_tasks(plan, plan.parts, [FileTarget(tmp_path)] * len(plan.parts))
    assert len(tasks) == len(plan.parts)
    assert len(make_record(plan, ENVIRONMENT).to_json()) < 32 << 20
    assert time.process_time() - started < 20


def read_length(path: Path) -> int:
    """Return the length of a header."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def test_reads_go_through_what_this_file_counts() -> None:
    assert "os.preadv" in Path(system.__file__).read_text()
