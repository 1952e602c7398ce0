"""How parts become uploads: whole, in order, and within the limits of S3 whatever the model."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plan.sketches import plan_of, write_sketch

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.chunks import BESIDE_BYTES, CHUNK_BYTES, PartUpload, count_chunks, cut_chunks
from mergemill.engine.runs.outputs.upload import UploadTarget, check_limits, make_targets
from mergemill.engine.storage.multipart import LEAST_BYTES, MOST_BYTES, MOST_PARTS, S3Objects

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def test_the_limits_are_those_of_s3() -> None:
    assert (LEAST_BYTES, MOST_PARTS, MOST_BYTES) == (5 * MIB, 10_000, 5 * TIB)


@given(st.integers(1, 200 * MIB))
@example(1)
@example(CHUNK_BYTES - 1)
@example(CHUNK_BYTES)
@example(2 * CHUNK_BYTES - 1)
@example(2 * CHUNK_BYTES)
def test_chunks_are_as_large_as_s3_asks_and_fit_the_memory_that_is_set_aside(size_bytes: int) -> None:
    chunks = cut_chunks(size_bytes)
    assert len(chunks) == count_chunks(size_bytes)
    assert sum(chunks) == size_bytes
    assert len(chunks) == 1 or min(chunks) >= CHUNK_BYTES >= LEAST_BYTES
    assert max(chunks) < 2 * CHUNK_BYTES
    to = PartUpload(S3Objects(), "s3://bucket/shard", "upload", 1, b"", size_bytes)
    assert max(chunks) <= to.slot_bytes
    assert UploadTarget(to).beside_bytes <= BESIDE_BYTES


def plan_sketch(folder: Path, *elements: int, shard_size: str = "5GB") -> Plan:
    """Plan the copy of a model with bfloat16 vectors of these sizes, whose values take no disk."""
    write_sketch(folder, {f"layers.{i}.table": ("BF16", [size]) for i, size in enumerate(elements)})
    return plan_of({"merge_method": "passthrough", "models": [{"model": str(folder)}]}, shard_size=shard_size)


def list_uploads(plan: Plan) -> list[list[tuple[int, int]]]:
    """Return number and size of each upload, by shard."""
    urls = [shard.name for shard in plan.shards]
    uploads: dict[str, list[tuple[int, int]]] = {url: [] for url in urls}
    for target in make_targets(plan, S3Objects(), urls, urls):
        assert isinstance(target, UploadTarget)
        uploads[target.to.url] += [(target.to.first + i, size) for i, size in enumerate(target.to.sizes)]
    return list(uploads.values())


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 40 * MIB) | st.sampled_from([1, 5 * MIB // 2, 5 * MIB, GIB]), min_size=1, max_size=12),
    st.sampled_from(["5GB", "20MB", "tensor"]),
)
@example([7 * MIB, 300 * MIB, 100, 2 * GIB, 1], "5GB")
@example([1, 20 * GIB, 1], "50GB")
def test_all_uploads_of_a_shard_but_the_last_are_as_large_as_s3_asks(elements: list[int], shard_size: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_sketch(Path(folder), *elements, shard_size=shard_size)
    check_limits(plan)
    for shard, uploads in zip(plan.shards, list_uploads(plan), strict=True):
        if not uploads:
            assert len(shard.header) == shard.size_bytes
            continue
        assert [number for number, _ in uploads] == list(range(1, len(uploads) + 1))
        assert sum(size for _, size in uploads) == shard.size_bytes
        assert all(size >= LEAST_BYTES for _, size in uploads[:-1])
        assert len(uploads) <= MOST_PARTS


def test_a_shard_of_more_uploads_than_s3_takes_is_refused(tmp_path: Path) -> None:
    """128 MiB parts in 16 uploads each: 78 GiB are the most; what is refused could be written in smaller shards."""
    plan = plan_sketch(tmp_path, 50 * GIB, shard_size="tensor")
    with pytest.raises(OutputError, match=r"12800 uploads; S3 takes 5497558138880 bytes and 10000 uploads for an obj"):
        check_limits(plan)
    check_limits(plan_sketch(tmp_path, 35 * GIB, shard_size="tensor"))
    check_limits(plan_sketch(tmp_path, *[5 * GIB] * 10, shard_size="20GB"))


def test_tensors_without_elements_need_no_upload(tmp_path: Path) -> None:
    plan = plan_sketch(tmp_path, 0, 0)
    assert list_uploads(plan) == [[]]
    check_limits(plan)
