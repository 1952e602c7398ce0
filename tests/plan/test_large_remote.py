"""A plan of 70B models that lie in object storage 50 ms away: seconds, headers only, a few requests for each."""

import time
from collections.abc import Iterator

import pytest
from models import llama_shapes
from plan.sketches import config, plan_of, write_sketch
from run.buckets import found_by_environment
from servers.folder import start_folder
from servers.journal import Journal
from servers.proxy import start_proxy_process

from mergemill.engine import describe_plan

LAYERS, HIDDEN, KV, FFN, VOCAB = 80, 8192, 1024, 28_672, 128_256
SHARDS, LATENCY_S = 30, 0.05
MODELS = ("base", "chat", "code")


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
    started = time.perf_counter()
    models = [{"model": f"s3://any/{name}", "parameters": {"weight": 0.5, "density": 0.5}} for name in MODELS[1:]]
    plan = plan_of({"merge_method": "ties", "base_model": "s3://any/base", "models": models})
    found = describe_plan(plan, memory="1GiB")
    seconds = time.perf_counter() - started
    assert (found["tensors"], len(plan.shards)) == (723, SHARDS)
    assert found["read_bytes"] == 3 * 141_107_412_992
    # A list of the folder and one of the chat templates below it; index and config; the headers.
    assert asked.count() == {"list": 2 * 3, "get": (2 + SHARDS) * 3}
    assert asked.sent_bytes < 3 * SHARDS * (1 << 16) + (1 << 20)
    assert seconds < 10, f"{seconds:.1f} s for {sum(asked.count().values())} requests"
