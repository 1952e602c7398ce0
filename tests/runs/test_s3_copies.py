"""Bytes that are only copied from S3 to the same S3: the server copies them, and they are those of a local merge."""

import hashlib
from pathlib import Path

import pytest
from models import write_llama
from runs.buckets import Place, new_place, put_family
from runs.merging import make_recipe_of, parts_of
from servers.s3 import S3

from mergemill.engine import make_plan, run, verify
from mergemill.engine.errors import MergemillError, SourceChanged
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed
from mergemill.engine.runs.outputs.copies import CopiedStretch, find_source, find_stretches
from mergemill.engine.storage.ranges import Pin

MIB = 1 << 20
PART = 16 * MIB
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="session")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``A``, whose embedding is several uploads. Not to be changed."""
    folder = tmp_path_factory.mktemp("tall")
    write_llama(folder / "A", vocab=24_000, hidden=512, intermediate=512, layers=1, seed=1)
    return folder


def plan_copy(models: Path | str, dtype: str | None = None) -> Plan:
    """Plan the copy of one model, in parts of some uploads each."""
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{models}/A"}]}
    with parts_of(PART):
        return make_plan(make_recipe_of(recipe | ({"dtype": dtype} if dtype else {})))


def run_here(plan: Plan, out: Path | str) -> Committed:
    return run(plan, out, workers=0, threads=2)


def hash_shard(out: Path | Place) -> str:
    data = out.read()[SHARD] if isinstance(out, Place) else (out / SHARD).read_bytes()
    return hashlib.sha256(data).hexdigest()


def test_what_is_only_copied_is_copied_by_the_server(s3: S3, tall: Path, tmp_path: Path) -> None:
    out, local, models = new_place(s3), tmp_path / "out", put_family(s3, tall)
    whole = run_here(plan_copy(tall), local)
    committed = run_here(plan_copy(models.url), out.url)
    assert hash_shard(out) == hash_shard(local)
    assert committed.read_bytes < whole.read_bytes / 2, "the first upload has the header, and is read for that"
    with parts_of(PART):
        found = verify(out.url, replay=1)
    assert (found.parts, found.replayed) == (committed.parts, 1)
    assert out.uploads() == {}


def test_what_is_changed_on_the_way_is_merged(s3: S3, tall: Path, tmp_path: Path) -> None:
    out, local, models = new_place(s3), tmp_path / "out", put_family(s3, tall)
    run_here(plan_copy(tall, "float16"), local)
    plan = plan_copy(models.url, "float16")
    assert all(find_stretches(part, 0) is None for part in plan.parts)
    run_here(plan, out.url)
    assert hash_shard(out) == hash_shard(local)


def test_from_another_store_bytes_come_by_way_of_the_worker(s3: S3, tall: Path) -> None:
    out, plan = new_place(s3), plan_copy(tall)
    committed = run_here(plan, out.url)
    assert committed.read_bytes == plan.read_bytes
    assert verify(out.url).parts == len(plan.parts)


def test_a_source_that_changed_is_not_copied(seaweed: S3, tall: Path) -> None:
    models, out = new_place(seaweed).fill(tall), new_place(seaweed)
    plan = plan_copy(models.url)
    shard = next(name for name in models.sizes() if name.startswith("A/") and name.endswith(".safetensors"))
    models.put(shard, models.read()[shard][::-1])
    with pytest.raises(SourceChanged, match="changed since the plan was made"):
        run_here(plan, out.url)
    assert not out.is_loadable()


def test_verifying_needs_the_source_as_it_was(seaweed: S3, tall: Path) -> None:
    models, out = new_place(seaweed).fill(tall), new_place(seaweed)
    run_here(plan_copy(models.url), out.url)
    for name in models.sizes():
        if name.startswith("A/") and name.endswith(".safetensors"):
            models.put(name, models.read()[name][::-1])
    with pytest.raises(MergemillError, match="changed since the plan was made"):
        verify(out.url)


def test_a_chunk_is_copied_from_one_stretch_that_holds_all_of_it() -> None:
    first, second = Pin("s3://b/a", 99 * MIB, "etag:1"), Pin("s3://b/b", 99 * MIB, "etag:2")
    stretches = [CopiedStretch(100, 20 * MIB, first, 7), CopiedStretch(100 + 20 * MIB, 30 * MIB, second, 11)]
    assert find_source(stretches, 0, 8 * MIB) is None, "the header is of no source"
    assert find_source(stretches, 8 * MIB, 16 * MIB) == (first, 8 * MIB - 93)
    assert find_source(stretches, 16 * MIB, 24 * MIB) is None, "it is of two"
    assert find_source(stretches, 24 * MIB, 32 * MIB) == (second, 4 * MIB - 89)
    assert find_source(stretches, 24 * MIB, 28 * MIB) is None, "S3 takes no part so small"
