"""`verify` finds what changed since a merge was finished, and says where."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from runs.merging import METHODS, SMALL_PART, flip_bit, list_files, parts_of, plan_merge

from mergemill.engine import run, verify
from mergemill.engine.errors import OutputError, VerifyError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.record import checksum
from mergemill.engine.runs.verify import Verified

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def plan(family: Path) -> Plan:
    return plan_merge("linear", family)


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(plan, out, workers=0, threads=2)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished merge, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def replay(out: Path, count: int) -> Verified:
    with parts_of(SMALL_PART):
        return verify(out, replay=count)


def test_a_merge_as_it_was_written_is_right_and_left_alone(plan: Plan, out: Path) -> None:
    before = list_files(out)
    found = verify(out)
    assert (found.shards, found.parts, found.files) == (len(plan.shards), len(plan.parts), len(plan.files))
    assert found.bytes == sum(part.size_bytes for part in plan.parts)
    assert found.bytes + len(plan.shards[0].header) == (out / SHARD).stat().st_size, "every byte is looked at"
    assert found.digest == plan.digest
    assert found.replayed == 0
    assert list_files(out) == before


@pytest.mark.parametrize("number", [0, 11, -1])
@pytest.mark.parametrize("at", ["first", "last"])
def test_a_flipped_bit_is_found_and_its_range_named(number: int, at: str, plan: Plan, out: Path) -> None:
    part = plan.parts[number]
    flip_bit(out / SHARD, part.start_bytes if at == "first" else part.stop_bytes - 1)
    with pytest.raises(
        VerifyError, match=rf"{SHARD}: bytes {part.start_bytes} to {part.stop_bytes} changed since they were written"
    ) as error:
        verify(out)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("offset", [0, 7, 8, 200])
def test_a_changed_header_is_found(offset: int, out: Path) -> None:
    flip_bit(out / SHARD, offset)
    with pytest.raises(VerifyError, match=f"{SHARD}: its header is not the one that was planned"):
        verify(out)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_shard_of_another_size_is_found(more: int, out: Path) -> None:
    size = (out / SHARD).stat().st_size
    os.truncate(out / SHARD, size + more)
    with pytest.raises(VerifyError, match=f"{SHARD}: has {size + more} bytes; {size} were written"):
        verify(out)


def test_a_missing_shard_is_found(out: Path) -> None:
    (out / SHARD).unlink()
    with pytest.raises(VerifyError, match=f"{SHARD}: is gone"):
        verify(out)


def test_every_small_file_is_looked_at(plan: Plan, finished: Path, tmp_path: Path) -> None:
    names = [file.name for file in plan.files]
    assert {"config.json", "tokenizer.json", "README.md", "recipe.yml", "model.safetensors.index.json"} <= set(names)
    for name in names:
        changed = Path(shutil.copytree(finished, tmp_path / f"changed-{name}"))
        flip_bit(changed / name, 3)
        with pytest.raises(VerifyError, match=f"{name}: changed since it was written"):
            verify(changed)
        (changed / name).unlink()
        with pytest.raises(VerifyError, match=f"{name}: is gone"):
            verify(changed)


def test_a_lost_receipt_is_found(plan: Plan, out: Path) -> None:
    journal = out / ".mergemill" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"part": 4,' not in line))
    with pytest.raises(VerifyError, match=f"lacks the receipt of a part that ends at byte {plan.parts[4].stop_bytes}"):
        verify(out)


def test_an_unfinished_merge_says_how_to_go_on(plan: Plan, out: Path) -> None:
    journal = out / ".mergemill" / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(VerifyError, match=f"is unfinished: 3 of {len(plan.parts)} parts; run the same merge again"):
        verify(out)


def test_a_folder_without_a_merge_is_refused(family: Path) -> None:
    with pytest.raises(OutputError, match="holds no merge that mergemill wrote") as error:
        verify(family / "A")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_replays_to_the_same_bytes_also_where_tensors_are_cut(
    method: str, family: Path, tmp_path: Path
) -> None:
    plan = plan_merge(method, family)
    assert any(not piece.whole for part in plan.parts for piece in part.pieces)
    run(plan, tmp_path / "out", workers=0, threads=2)
    assert replay(tmp_path / "out", 3).replayed == 3
    assert replay(tmp_path / "out", 1_000).replayed == len(plan.parts)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_replay_finds_a_part_that_was_merged_wrongly(method: str, family: Path, tmp_path: Path) -> None:
    """Bytes and receipt agree with each other, but not with the sources."""
    out = tmp_path / "out"
    plan = plan_merge(method, family)
    run(plan, out, workers=0, threads=2)
    part = plan.parts[7]
    flip_bit(out / SHARD, part.start_bytes + 1)
    data = (out / SHARD).read_bytes()[part.start_bytes : part.stop_bytes]
    journal = FolderOutput(out).journal
    (receipt,) = (found for found in journal.read() if found.part == 7)
    journal.append(replace(receipt, checksum=checksum([data])))
    assert verify(out).parts == len(plan.parts)
    with pytest.raises(
        VerifyError, match=f"{SHARD}: merging bytes {part.start_bytes} to {part.stop_bytes} again gives other bytes"
    ):
        replay(out, 1_000)


def test_a_replay_needs_the_sources_as_they_were(own_family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_merge("linear", own_family), out, workers=0)
    os.utime(own_family / "A" / "model.safetensors", ns=(1, 1))
    with pytest.raises(VerifyError, match=r"linear\.yml: gives another plan now; the sources or the version changed"):
        replay(out, 1)
    assert verify(out).replayed == 0, "the bytes alone can still be verified"
    shutil.rmtree(own_family / "A")
    with pytest.raises(VerifyError, match=r"cannot be merged again from here: .*A: no such file or folder"):
        replay(out, 1)
