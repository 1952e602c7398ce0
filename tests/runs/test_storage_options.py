"""Storage that a recipe's `storage_options` lead to, in this process and in workers; the environment says nothing."""

import hashlib
import json
import shlex
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from clusters import WAIT_S, start_cluster
from models import write_llama
from runs.buckets import Place, new_place, put_family
from runs.merging import Killed, make_recipe_of
from servers.s3 import REGION, S3

from mergemill.cli.main import execute
from mergemill.engine import make_plan, run
from mergemill.engine.errors import InputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Event, PartFinished, Started
from mergemill.engine.storage.ranges import close_all

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def profile(seaweed_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an AWS profile that holds the keys; nothing else says where the server is, or who asks."""
    for name in seaweed_server.make_environ():
        monkeypatch.delenv(name, raising=False)
    keys = f"aws_access_key_id = {seaweed_server.access_key}\naws_secret_access_key = {seaweed_server.secret_key}\n"
    (tmp_path / "credentials").write_text(f"[mill]\n{keys}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    close_all()
    yield "mill"
    close_all()


def plan_with(models: Place, options: dict[str, object]) -> Plan:
    recipe = {"merge_method": "linear", "models": [{"model": f"{models.url}/{name}"} for name in "AB"]}
    weight = {"parameters": {"weight": 1}, "storage_options": {"s3": options}}
    return make_plan(make_recipe_of(recipe | weight))


@pytest.mark.parametrize("workers", [0, 1])
def test_options_lead_to_the_storage(
    workers: int, profile: str, seaweed_server: S3, family: Path, tmp_path: Path
) -> None:
    models, out = put_family(seaweed_server, family), new_place(seaweed_server)
    options = {"profile": profile, "endpoint_url": seaweed_server.url, "region": REGION, "addressing_style": "path"}
    plan = plan_with(models, options)
    run(plan, out.url, workers=workers)
    recipe = {"merge_method": "linear", "models": [{"model": f"{family}/{name}"} for name in "AB"]}
    run(make_plan(make_recipe_of(recipe | {"parameters": {"weight": 1}})), tmp_path / "out", workers=0)
    expected = hashlib.sha256((tmp_path / "out" / SHARD).read_bytes()).hexdigest()
    assert out.hash()[SHARD] == expected
    assert plan.digest == json.loads(out.read()[".mergemill/plan.json"])["digest"]
    assert all(seaweed_server.secret_key.encode() not in data for data in out.read().values())


def test_so_do_the_commands_on_an_output(
    profile: str, seaweed_server: S3, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a process that knows nothing of the merge; the recipe that was merged is at hand."""
    models, out = put_family(seaweed_server, family), new_place(seaweed_server)
    options = {"profile": profile, "endpoint_url": seaweed_server.url, "region": REGION, "addressing_style": "path"}
    plan = plan_with(models, options)
    recipe, cluster = tmp_path / "recipe.yml", tmp_path / "cluster.yml"
    recipe.write_text(plan.origin.text)
    cluster.write_text(json.dumps({"kind": "local", "workers": 1, "storage_options": {"s3": options}}))
    for_recipe, for_cluster = ("--storage-as", str(recipe)), ("--cluster", str(cluster))

    def execute_anew(*arguments: str) -> tuple[int, str]:
        code = execute([*arguments, out.url])
        return code, capsys.readouterr().out

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished):
            raise Killed

    with pytest.raises(Killed):
        run(plan, out.url, workers=0, threads=1, on_event=stop)
    assert "unfinished: " in execute_anew("inspect", *for_cluster)[1]
    code, told = execute_anew("status", *for_cluster)
    assert (code, f"mergemill abort {out.url}{shlex.join(['', *for_cluster])[2:]}" in told) == (0, True)
    assert [execute_anew(name, *for_cluster)[0] for name in ("attach", "cancel")] == [1, 2]  # nobody drives it
    code, told = execute_anew("abort", *for_recipe)
    assert (code, "the unfinished merge is removed" in told, out.sizes()) == (0, True, {})
    run(plan, out.url, workers=0)
    code, told = execute_anew("verify", "--replay", "1", *for_recipe, *for_cluster)
    assert (code, "as it was written" in told, "1 part merged again" in told) == (0, True, True)


def test_a_cluster_file_alone_leads_there_from_the_command_line(
    profile: str, seaweed_server: S3, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver reads headers and lists the output by it, and its worker processes read and write."""
    models, out = put_family(seaweed_server, family), new_place(seaweed_server)
    options = {"profile": profile, "endpoint_url": seaweed_server.url, "region": REGION, "addressing_style": "path"}
    recipe, cluster = tmp_path / "recipe.yml", tmp_path / "cluster.yml"
    lines = {"merge_method": "linear", "models": [{"model": f"{models.url}/{name}"} for name in "AB"]}
    recipe.write_text(json.dumps(lines | {"parameters": {"weight": 1}}))
    file = {"kind": "local", "workers": 2, "memory": "256MiB", "storage_options": {"s3": options}}
    cluster.write_text(json.dumps(file))

    def execute_anew(*arguments: object) -> tuple[int, str]:
        code = execute([*map(str, arguments), "--cluster", str(cluster)])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    code, told = execute_anew("plan", recipe, "--json")
    assert code == 0
    assert json.loads(told)["cluster"] == str(cluster)
    code, told = execute_anew("merge", recipe, out.url, "--json")
    assert code == 0
    started = next(event for line in told.splitlines() if (event := json.loads(line))["event"] == "started")
    assert (started["workers"], started["memory_bytes"]) == (2, 256 << 20)
    here = make_recipe_of(
        {**lines, "models": [{"model": f"{family}/{name}"} for name in "AB"], "parameters": {"weight": 1}}
    )
    run(make_plan(here), tmp_path / "out", workers=0)
    assert out.hash()[SHARD] == hashlib.sha256((tmp_path / "out" / SHARD).read_bytes()).hexdigest()
    assert all(seaweed_server.secret_key.encode() not in data for data in out.read().values())


@pytest.mark.parametrize("place", ["threads", "worker"])
def test_two_merges_at_once_in_one_process_read_and_write_each_its_own_storage(
    place: str,
    seaweed_server: S3,
    moto_server: S3,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they read and write has the same names on both servers, and other bytes; neither begins before both can.

    moto takes any key, so that both go by the same environment.
    """
    for name in seaweed_server.make_environ():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed_server.secret_key)
    name, servers = f"twice-{place}", [seaweed_server, moto_server]
    both = threading.Barrier(2, timeout=WAIT_S)
    expected = []
    for number, server in enumerate(servers):
        folder = tmp_path / str(number)
        for seed, model in enumerate("AB"):
            write_llama(folder / model, seed=10 * number + seed, layers=2)
        Place(server, name).fill(folder)
        recipe = {"merge_method": "linear", "models": [{"model": f"{folder}/{model}"} for model in "AB"]}
        run(make_plan(make_recipe_of(recipe | {"parameters": {"weight": 1}})), folder / "out", workers=0)
        expected.append(hashlib.sha256((folder / "out" / SHARD).read_bytes()).hexdigest())

    def merge(server: S3, where: Mapping[str, Any]) -> str:
        plan = plan_with(
            Place(server, name), {"endpoint_url": server.url, "region": REGION, "addressing_style": "path"}
        )
        run(plan, f"s3://models/{name}-out", on_event=lambda event: wait_at(event, both), **where)
        return Place(server, f"{name}-out").hash()[SHARD]

    with ExitStack() as stack:
        where: dict[str, Any] = {"workers": 0, "threads": 1}
        if place == "worker":
            cluster = stack.enter_context(start_cluster(tmp_path_factory.mktemp("cluster"), count=1))
            where = {"scheduler": cluster.address, "memory": "256MiB"}
        pool = stack.enter_context(ThreadPoolExecutor(2))
        found = [coming.result(WAIT_S) for coming in [pool.submit(merge, server, where) for server in servers]]
    assert expected[0] != expected[1]
    assert found == expected


def wait_at(event: Event, both: threading.Barrier) -> None:
    """Have a merge that is set up wait for the other one."""
    if isinstance(event, Started):
        both.wait()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profil": "x"}, "'profil' may be a secret, .*; known are profile, region, endpoint_url"),
        ({"profile": "nobody"}, "nobody"),
    ],
)
def test_options_that_lead_nowhere_are_one_line(options: dict[str, object], words: str, profile: str) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "s3://models/a", "parameters": {"weight": 1}}]}
    with pytest.raises(InputError, match=words) as caught:
        make_plan(make_recipe_of(recipe | {"storage_options": {"s3": options}}))
    assert "\n" not in str(caught.value)
