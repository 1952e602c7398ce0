"""A worker that was cut off, and still writes when others have finished its part: the same bytes, or none.

The writers are the real ones, opened as a task opens them, and kept open over what the drivers do meanwhile.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from runs.merging import hash_output, plan_merge, run_until
from servers.s3 import S3

from mergemill.engine import abort, run, verify
from mergemill.engine.errors import SourceChanged, StorageError
from mergemill.engine.plan.values import Part, Plan
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.runs.tasks.task import run_part
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.multipart import S3Objects
from mergemill.engine.storage.ranges import close_all
from mergemill.engine.tensors.slabs import BLOCK

METHOD = "linear"
WRONG = memoryview(b"\xff" * 64)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """What this process reads as a worker is closed afterwards."""
    yield
    close_all()


@contextmanager
def cut_off(plan: Plan, out: Path, part: int = -1) -> Iterator[tuple[Part, object]]:
    """Begin the merge, and open a part of it as a worker does that is cut off then."""
    run_until(plan, out, 3)
    target = find_output(out).targets(plan)[part]
    with ExitStack() as stack:
        writer = stack.enter_context(target.open_part(plan.parts[part], np.zeros(0, np.uint8)))  # type: ignore[union-attr]
        yield plan.parts[part], writer


def test_what_it_writes_after_an_abort_lands_nowhere(family: Path, tmp_path: Path) -> None:
    """Also where another merge has begun and finished in the same folder, with shards of the same names."""
    out, other = tmp_path / "out", plan_merge("ties", family)
    with cut_off(plan_merge(METHOD, family), out) as (part, writer):
        abort(out)
        run(other, out, workers=0)
        before = hash_output(out)
        writer.write(part.start_bytes, WRONG)  # type: ignore[attr-defined]
    assert hash_output(out) == before
    verify(out)


def test_a_merge_that_is_begun_anew_after_an_abort_has_files_of_its_own(family: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", plan_merge(METHOD, family)
    with cut_off(plan, out) as (part, writer):
        abort(out)
        run(plan, out, workers=0)
        writer.write(part.start_bytes, WRONG)  # type: ignore[attr-defined]
    verify(out)


def test_a_part_that_is_begun_after_the_commit_finds_nothing_to_write_to(family: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", plan_merge(METHOD, family)
    run_until(plan, out, 3)
    target, part = find_output(out).targets(plan)[-1], plan.parts[-1]
    run(plan, out, workers=0)
    before = hash_output(out)
    with pytest.raises(StorageError, match="opening this file failed"):
        run_part(part, plan.shards[0].name, target, {}, Workplace(1 << 28, 1))  # type: ignore[arg-type]
    assert hash_output(out) == before


@pytest.mark.parametrize("sources", ["as they were", "overwritten"])
def test_it_writes_the_same_bytes_after_the_commit_or_none(
    sources: str, own_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps before its second slab, while others finish the merge and its user writes other models there."""
    out, plan = tmp_path / "out", plan_merge(METHOD, own_family, part_bytes=1 << 20)
    run_until(plan, out, 1)
    part = max(plan.parts[1:], key=lambda each: each.size_bytes)
    target = find_output(out).targets(plan)[part.number]
    before: dict[str, str] = {}
    check_going = Workplace.check_going

    def sleep(self: Workplace) -> None:
        check_going(self)
        slabs.append(1)
        if len(slabs) == 2:
            monkeypatch.setattr(Workplace, "check_going", check_going)
            run(plan, out, workers=0, threads=1)
            before.update(hash_output(out))
            if sources == "overwritten":
                overwrite(own_family)

    slabs: list[int] = []
    monkeypatch.setattr(Workplace, "check_going", sleep)
    workplace = Workplace(1 << 28, 1)
    shard = plan.shards[part.shard].name
    if sources == "overwritten":
        with pytest.raises(SourceChanged):
            run_part(part, shard, target, {}, workplace, slab=BLOCK)  # type: ignore[arg-type]
    else:
        run_part(part, shard, target, {}, workplace, slab=BLOCK)  # type: ignore[arg-type]
    assert len(slabs) > 1
    assert before
    assert hash_output(out) == before


def overwrite(family: Path) -> None:
    """Write other bytes into the models' files, which stay the same files."""
    for path in family.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_WRONLY)
        size_bytes = os.fstat(descriptor).st_size
        os.pwrite(descriptor, b"\x55" * (size_bytes - 8192), 8192)
        os.close(descriptor)


def test_an_upload_after_the_commit_or_an_abort_is_refused_by_the_server(seaweed: S3) -> None:
    for end in ("complete", "abort"):
        url = f"s3://models/zombie-{end}"
        upload = S3Objects().start_upload(url)
        etag = S3Objects().upload_part(url, upload, 1, memoryview(b"right")).result()
        if end == "complete":
            assert S3Objects().complete_upload(url, upload, [(1, etag)])
        else:
            S3Objects().abort_upload(url, upload)
        with pytest.raises(StorageError):
            S3Objects().upload_part(url, upload, 1, WRONG).result()
        assert S3Objects().get(url) == (b"right" if end == "complete" else None)
