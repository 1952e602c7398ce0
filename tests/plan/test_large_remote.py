"""A plan of 70B models that lie in object storage 50 ms away: seconds, headers only, a few requests for each."""

import time
from collections import Counter
from collections.abc import Iterator

import pytest
from models import llama_shapes
from plan.sketches import config, plan_of, write_sketch
from runs.buckets import found_by_environment
from servers.folder import start_folder
from servers.journal import Journal
from servers.proxy import start_proxy_process

from mergemill.engine import describe_plan
from mergemill.engine.storage.fetch import PIECE_BYTES

LAYERS, HIDDEN, KV, FFN, VOCAB = 80, 8192, 1024, 28_672, 128_256
SHARDS, LATENCY_S = 30, 0.05
MODELS = ("base", "chat", "code")
MODEL_BYTES = 141_107_412_992
MOST_S = 10


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    """What is asked of the server of three models with the names, shapes and shards of Llama 3 70B, 141 GB each."""
    shapes = llama_shapes(layers=LAYERS, hidden=HIDDEN, kv_size=KV, intermediate=FFN, vocab=VOCAB, tied=False)
    folder = tmp_path_factory.mktemp("large")
    for name in MODELS:
        tensors = {tensor: ("BF16", shape) for tensor, shape in shapes.items()}
        write_sketch(folder / name, tensors, config=config(layers=LAYERS), shards=SHARDS, tokenizer=True)
    with (
        start_folder(folder) as (server, journal),
        start_proxy_process(server.url, latency_s=LATENCY_S) as url,
        found_by_environment(server.through(url)),
    ):
        yield journal


def test_a_70b_is_planned_in_seconds_from_far_away(asked: Journal) -> None:
    models = [{"model": f"s3://any/{name}", "parameters": {"weight": 0.5, "density": 0.5}} for name in MODELS[1:]]
    recipe = {"merge_method": "ties", "base_model": "s3://any/base", "models": models}
    for _ in range(3):  # a busy machine is no fault
        started, before = time.perf_counter(), len(asked.exchanges)
        plan = plan_of(recipe)
        found = describe_plan(plan, memory="1GiB")
        seconds = time.perf_counter() - started
        made = asked.exchanges[before:]
        # A list of the folder, a look for a merge; index and config; headers; the
        # tokenizers. Of the donor another list, and tokenizer_config.json, for code and for the ids of its roles.
        assert Counter(each.request.kind for each in made) == {
            "list": 3 + 1,
            "head": 3,
            "get": (2 + SHARDS) * 3 + 2 + 3,
        }
        assert sum(each.sent_bytes for each in made) < 3 * SHARDS * (1 << 16) + (1 << 20)
        if seconds < MOST_S:
            break
    assert seconds < MOST_S, f"{seconds:.1f} s for {len(made)} requests"
    assert (found["tensors"], len(plan.shards)) == (723, SHARDS)
    assert found["read_bytes"] == 3 * MODEL_BYTES
    (traffic,) = found["remote"]
    assert (traffic["scheme"], traffic["read_bytes"]) == ("s3", 3 * MODEL_BYTES)
    assert traffic["read_requests"] == pytest.approx(3 * MODEL_BYTES / PIECE_BYTES, rel=0.05)
