"""Storage that a recipe's `storage_options` lead to, in this process and in workers; the environment says nothing."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from run.buckets import Place, new_place, put_family
from run.merging import make_recipe_of
from servers.s3 import REGION, S3

from mergemill.engine import make_plan, run
from mergemill.engine.errors import CheckpointError
from mergemill.engine.plan.values import Plan
from mergemill.engine.storage.ranges import close_all
from mergemill.engine.storage.store import use_options

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
    use_options({})
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profil": "x"}, "unknown option 'profil'; known are profile, region, endpoint_url"),
        ({"profile": "nobody"}, "nobody"),
    ],
)
def test_options_that_lead_nowhere_are_one_line(options: dict[str, object], words: str, profile: str) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "s3://models/a", "parameters": {"weight": 1}}]}
    with pytest.raises(CheckpointError, match=words) as caught:
        make_plan(make_recipe_of(recipe | {"storage_options": {"s3": options}}))
    assert "\n" not in str(caught.value)
