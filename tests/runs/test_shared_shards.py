"""A shard that two models have alike is read once, and every byte is as if it were read twice."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import read_tensors, write_llama
from runs.buckets import Place, found_by_environment, new_place
from runs.merging import hash_output, make_recipe_of, parts_of
from safetensors.torch import save_file
from servers.fixtures import BUCKET
from servers.proxy import Proxy, start_proxy
from servers.s3 import S3

from mergemill.engine import describe_plan, make_plan, run
from mergemill.engine.plan import make
from mergemill.engine.plan.values import Plan

SHARDS = 3


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and ``A`` that changed one of its three shards."""
    folder = tmp_path_factory.mktemp("tuned")
    for name in ("base", "A"):
        write_llama(folder / name, seed=1, layers=2, hidden=128, vocab=2000, shards=SHARDS)
    shard = sorted((folder / "A").glob("*.safetensors"))[1]
    weight_map = json.loads((folder / "A" / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: x for name, x in read_tensors(folder / "A").items() if weight_map[name] == shard.name}
    save_file({name: x + torch.randn_like(x) / 8 for name, x in tensors.items()}, shard, {"format": "pt"})
    return folder


@pytest.fixture
def proxy(s3_server: S3) -> Iterator[Proxy]:
    with start_proxy(s3_server.url) as running, found_by_environment(s3_server.through(running.url)):
        yield running


def put_copies(server: S3, tuned: Path) -> Place:
    """Put the base there, and the other by copies on the server of what it has in common with it."""
    place = new_place(server, name="tuned").fill(tuned)
    client = server.connect()
    for file in (tuned / "A").glob("*.safetensors"):
        if file.read_bytes() == (tuned / "base" / file.name).read_bytes():
            source = {"Bucket": BUCKET, "Key": f"{place.prefix}/base/{file.name}"}
            client.copy_object(Bucket=BUCKET, Key=f"{place.prefix}/A/{file.name}", CopySource=source)
    client.close()
    return place


def plan_of(place: str, method: str = "task_arithmetic") -> Plan:
    models = [{"model": f"{place}/A", "parameters": {"weight": 0.7}}]
    with parts_of(1 << 20):
        return make_plan(make_recipe_of({"merge_method": method, "base_model": f"{place}/base", "models": models}))


def count_bytes(proxy: Proxy, place: Place) -> Counter[str]:
    """Return how much of each shard was sent."""
    sent: Counter[str] = Counter()
    for each in proxy.journal.exchanges:
        if each.request.method == "GET" and each.request.path.endswith(".safetensors"):
            sent[each.request.path.removeprefix(f"/{BUCKET}/{place.prefix}/")] += each.sent_bytes
    return sent


@pytest.mark.parametrize(("method", "memory"), [("task_arithmetic", "256MiB"), ("ties", "256MiB"), ("ties", "30MiB")])
def test_a_shard_that_was_copied_on_the_server_is_read_once(
    s3_server: S3, proxy: Proxy, tuned: Path, tmp_path: Path, method: str, memory: str
) -> None:
    place = put_copies(s3_server, tuned)
    plan = plan_of(place.url, method)
    planned = count_bytes(proxy, place)
    committed = run(plan, tmp_path / "out", workers=0, threads=1, memory=memory)
    merged = count_bytes(proxy, place) - planned
    names = [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    assert set(merged) == {*(f"A/{name}" for name in names), f"base/{names[1]}"}, "the recipe has A before its base"
    assert committed.read_bytes == merged.total()
    if memory == "256MiB":  # else TIES reads its inputs again for each of its passes
        weights = sum(x.numel() * x.element_size() for x in read_tensors(tuned / "base").values())
        alike = merged[f"A/{names[0]}"] + merged[f"A/{names[2]}"]
        assert merged.total() == pytest.approx(2 * weights - alike, abs=10_000)
    run(plan_of(str(tuned), method), tmp_path / "here", workers=0, threads=1)
    shards = [
        {name: value for name, value in hash_output(tmp_path / out).items() if name.endswith(".safetensors")}
        for out in ("out", "here")
    ]
    assert shards[0] == shards[1]


def test_ledger_and_digest_are_those_of_models_with_files_of_their_own(
    s3_server: S3, proxy: Proxy, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = put_copies(s3_server, tuned)
    shared = plan_of(place.url)
    monkeypatch.setattr(make, "share_reads", lambda checkpoints: checkpoints)
    apart = plan_of(place.url)
    assert (shared.digest, shared.sources) == (apart.digest, apart.sources)
    assert len(apart.pins) - len(shared.pins) == SHARDS - 1
    promised = [describe_plan(plan, memory="1GiB")["projected_bytes"] for plan in (shared, apart)]
    assert promised[0] <= promised[1]
