"""Merges straight from the Hub: the bytes of a merge from folders, and nothing of a token anywhere."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs.buckets import new_place
from runs.merging import hash_output, make_recipe_of, plan_merge
from servers.hub import Hub
from servers.s3 import S3

pytest.importorskip("huggingface_hub")

from hubs import Use, use_hub
from huggingface_hub import snapshot_download

from mergemill.engine import make_plan, merge, run, verify
from mergemill.engine.errors import CheckpointError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed, Event, PartFinished

NAMES = ("base", "A", "B")


@pytest.fixture
def use(hub: Hub, family: Path, tmp_path: Path) -> Iterator[Use]:
    """Have this process use a Hub that has the family: ``org/base`` and the others, whose main branch moved on."""
    for name in NAMES:
        first = hub.add_repo(f"org/{name}", {path.name: path for path in (family / name).iterdir()})
        hub.repos[f"org/{name}"].branches["v1"] = first
    with use_hub(hub, tmp_path / "home") as start:
        yield start


def run_here(plan: Plan, out: Path, **options: object) -> Committed:
    return run(plan, out, workers=0, threads=4, **options)  # type: ignore[arg-type]


def hash_weights(out: Path) -> dict[str, str]:
    """Return the hashes of all files but those that name the models."""
    return drop_names(hash_output(out))


def drop_names(hashes: dict[str, str]) -> dict[str, str]:
    return {name: found for name, found in hashes.items() if name not in ("README.md", "recipe.yml")}


@pytest.fixture
def expected(family: Path, tmp_path: Path) -> dict[str, str]:
    run_here(plan_merge("ties", family, shard_size="700KB"), tmp_path / "expected")
    return hash_weights(tmp_path / "expected")


@pytest.mark.usefixtures("use")
def test_a_merge_from_the_hub_is_one_from_folders_byte_for_byte(
    hub: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    run_here(plan_merge("ties", "hf://org", shard_size="700KB"), tmp_path / "out")
    assert hash_weights(tmp_path / "out") == expected
    assert hub.journal.count()["info"] == 3
    assert not (tmp_path / "home").exists()  # no copy of anything


@pytest.mark.usefixtures("use")
def test_so_has_one_from_the_hub_to_s3(s3: S3, tmp_path: Path, expected: dict[str, str]) -> None:
    out = new_place(s3)
    run_here(plan_merge("ties", "hf://org", shard_size="700KB", part_bytes=5 << 20), out.url)  # what S3 takes at least
    assert drop_names(out.hash()) == expected
    assert out.uploads() == {}
    assert not (tmp_path / "home").exists()
    assert verify(out.url, replay=2).replayed == 2


@pytest.mark.usefixtures("use")
def test_names_revisions_and_folders_go_together(hub: Hub, family: Path, tmp_path: Path) -> None:
    hub.add_commit("org/A", {"model.safetensors": None})
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": "org/base", "parameters": {"weight": 0.2}},
            {"model": "hf://org/A@v1", "parameters": {"weight": 0.3}},
            {"model": str(family / "B"), "parameters": {"weight": 0.5}},
        ],
    }
    run_here(make_plan(make_recipe_of(recipe)), tmp_path / "out")
    for entry, name in zip(recipe["models"], NAMES, strict=True):
        entry["model"] = str(family / name)  # type: ignore[index]
    run_here(make_plan(make_recipe_of(recipe)), tmp_path / "expected")
    assert hash_weights(tmp_path / "out") == hash_weights(tmp_path / "expected")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/base\n- org/A\n" in card


@pytest.mark.usefixtures("use")
def test_a_model_that_moves_on_while_it_is_merged_is_merged_as_planned(
    hub: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    plan = plan_merge("ties", "hf://org", shard_size="700KB")
    hub.add_commit("org/A", {"model.safetensors": b"something else", "tokenizer.json": b"{}"})
    times = []

    def expire(event: Event) -> None:
        if isinstance(event, PartFinished):
            hub.expire_locations()
            times.append(event)

    run_here(plan, tmp_path / "out", on_event=expire)
    assert len(times) > 10
    assert hash_weights(tmp_path / "out") == expected


def test_a_cached_model_gives_the_same_plan_and_is_not_fetched(
    hub: Hub, use: Use, tmp_path: Path, expected: dict[str, str]
) -> None:
    plan = plan_merge("ties", "hf://org", shard_size="700KB")
    for name in NAMES:
        snapshot_download(f"org/{name}", endpoint=hub.url, token=False)
    before = hub.journal.count()
    for offline in (False, True):
        use(offline=offline)
        again = plan_merge("ties", "hf://org", shard_size="700KB")
        assert (again.digest, again.pins) == (plan.digest, plan.pins)
        run_here(again, tmp_path / f"out-{offline}")
        assert hash_weights(tmp_path / f"out-{offline}") == expected
    assert hub.journal.count() - before == {"info": 3}
    use(offline=True)
    with pytest.raises(CheckpointError, match="org/C: no such folder; hf://org/C: the Hub may not be asked"):
        merge(make_recipe_of({"merge_method": "passthrough", "models": [{"model": "org/C"}]}), tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_private_model_is_merged_by_a_process_of_its_owner_and_leaves_no_token(
    hub: Hub, family: Path, tmp_path: Path, workers: int
) -> None:
    """Workers are processes of their own: they find Hub and token where the driver did."""
    for name in NAMES:
        hub.add_repo(f"org/{name}", {path.name: path for path in (family / name).iterdir()}, private=True)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"org/{name}", "parameters": {"weight": 0.5}} for name in NAMES],
    }
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    command = [
        str(Path(sys.executable).with_name("mergemill")),
        "merge",
        "recipe.yml",
        "out",
        "--workers",
        str(workers),
    ]

    def execute(token: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "no_proxy": "127.0.0.1"}
        environ |= hub.make_environ(tmp_path / "home", token=token)
        return subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)

    refused = execute("")
    assert refused.returncode == 2
    assert "org/base: no such folder; hf://org/base: no such model" in " ".join(refused.stderr.split())
    done = execute(hub.token)
    assert done.returncode == 0, done.stderr
    for name, entry in zip(NAMES, recipe["models"], strict=True):
        entry["model"] = str(family / name)  # type: ignore[index]
    run_here(make_plan(make_recipe_of(recipe)), tmp_path / "expected")
    assert hash_weights(tmp_path / "out") == hash_weights(tmp_path / "expected")
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for secret in (hub.token, "Signature="):
        assert secret not in done.stdout + done.stderr
        assert not any(secret.encode() in content for content in written)
