"""What goes wrong outside is one clear line; no loader finds a model, and nothing of the user's is gone."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs.merging import flip_bit, hash_output, is_loadable, list_files, plan_merge, slowed

from mergemill.engine import abort, inspect, run
from mergemill.engine.errors import (
    HeaderError,
    InputError,
    MergemillError,
    OutputError,
    PlanError,
    RunError,
    SourceChanged,
    StorageError,
)
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Event, PartFinished, Started
from mergemill.engine.runs.outputs import folder
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.receipts import Journal
from mergemill.engine.storage.beneath import Beneath

SHARD = "model-00001-of-00001.safetensors"


@contextmanager
def refused(kind: type[MergemillError], match: str, exit_code: int) -> Iterator[None]:
    """Expect an error of one line, of exactly this kind."""
    with pytest.raises(MergemillError, match=match) as found:
        yield
    assert type(found.value) is kind
    assert found.value.exit_code == exit_code
    assert "\n" not in str(found.value)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own on `folder`, which is made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a tmpfs, and not everywhere")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB; the merge wants 5.7."""
    with mounted(tmp_path / "disk", "size=2m") as folder:
        yield folder


@pytest.fixture(scope="module")
def plan(family: Path) -> Plan:
    return plan_merge("linear", family)


def run_until(plan: Plan, out: Path, parts: int) -> None:
    """Run `plan` and let it fail after `parts` receipts."""

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == parts:
            raise RunError("stopped by the test")

    with pytest.raises(RunError, match="stopped by the test"):
        run(plan, out, workers=0, threads=1, on_event=stop)


# --- the output ---


def test_a_disk_that_is_too_small_is_refused_before_anything_is_merged(plan: Plan, small_disk: Path) -> None:
    out = small_disk / "out"
    with refused(StorageError, r"disk too full: \d+ bytes are needed, \d+ are free; free \d+ bytes or choose", 1):
        run(plan, out, workers=0)
    assert not list(out.rglob("*.safetensors*"))
    abort(out)
    assert not out.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fills_up_stops_the_merge_which_a_larger_disk_finishes(
    workers: int, plan: Plan, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space was there when the merge began: somebody else took it."""
    out = small_disk / "out"
    with monkeypatch.context() as patch:
        patch.setattr(folder, "check_space", lambda folder, needed_bytes: None)
        with refused(StorageError, r"writing .*No space left on device", 1):
            run(plan, out, workers=workers, threads=1)
        assert not is_loadable(out)
        with refused(StorageError, "disk too full|No space left on device", 1):
            run(plan, out, workers=0)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    committed = run(plan, out, workers=0)
    run(plan, tmp_path / "expected", workers=0)
    assert hash_output(out) == hash_output(tmp_path / "expected")
    assert committed.redone_parts <= len(plan.parts)


def test_a_journal_that_cannot_be_written_stops_the_merge(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the disk full to the last byte the parts, whose blocks are there, can still be written."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def open_full(files: Beneath, name: str, flags: int) -> int:
        return os.open("/dev/full", os.O_RDWR) if flags & os.O_APPEND else open_file(files, name, flags)

    open_file = Beneath.open
    monkeypatch.setattr(Beneath, "open", open_full)
    with refused(StorageError, r"journal\.jsonl: writing a receipt failed: No space left on device", 1):
        run(plan, tmp_path / "out", workers=0)
    assert not is_loadable(tmp_path / "out")


def test_a_resume_asks_only_for_the_space_that_is_missing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(folder, "check_space", lambda folder, needed_bytes: asked.append(needed_bytes))
    run_until(plan, tmp_path / "out", len(plan.parts) - 2)
    run(plan, tmp_path / "out", workers=0)
    assert asked[0] == plan.write_bytes
    assert 0 <= asked[1] < plan.write_bytes / 2


def test_a_read_only_disk_is_refused(plan: Plan, tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "disk", "ro") as disk,
        refused(OutputError, "disk: cannot be written: the disk is read-only; choose a folder that you can write", 2),
    ):
        run(plan, disk / "out", workers=0)


def test_a_disk_that_became_read_only_does_not_take_a_resume(plan: Plan, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64m") as disk:
        run_until(plan, disk / "out", 3)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with refused(OutputError, "cannot be written", 2):
            run(plan, disk / "out", workers=0)


def test_a_folder_that_may_not_be_changed_is_refused(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", str(out)], capture_output=True).returncode:
        pytest.skip("only root may make a folder immutable, and not everywhere")
    try:
        with refused(OutputError, "out: cannot be written: permission denied; choose a folder", 2):
            run(plan, out, workers=0)
    finally:
        subprocess.run(["chattr", "-i", str(out)], check=True)
    assert list(out.iterdir()) == []


def test_an_output_below_a_file_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with refused(OutputError, "out: would lie below .*/file, which is a file; choose another folder", 2):
        run(plan, tmp_path / "file" / "out", workers=0)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_an_output_that_is_a_file_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with refused(OutputError, "out: is a file; the output must be a folder, new or empty", 2):
        run(plan, tmp_path / "out", workers=0)
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_a_folder_with_the_users_files_is_refused_and_left_as_it_was(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "notes.txt").write_bytes(b"mine")
    (out / "sub" / "model.safetensors").write_bytes(b"mine too")
    before = list_files(out)
    with refused(OutputError, "out: holds 'notes.txt' and 1 more; the output must be a folder, new or empty", 2):
        run(plan, out, workers=0)
    assert list_files(out) == before
    assert not (out / ".mergemill").exists()


def test_a_source_is_no_output(plan: Plan, family: Path) -> None:
    before = list_files(family / "A")
    with refused(OutputError, "the output must be a folder, new or empty", 2):
        run(plan, family / "A", workers=0)
    assert list_files(family / "A") == before


@pytest.mark.parametrize(
    ("difference", "options", "method"),
    [
        ("the seed", {"seed": 7}, "linear"),
        ("the recipe", {}, "task_arithmetic"),
        ("the shard size", {"shard_size": "1MB"}, "linear"),
        ("the layout", {"part_bytes": 1 << 30}, "linear"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_folder_with_another_merge_is_refused_and_says_what_differs(
    state: str, difference: str, options: dict[str, int], method: str, plan: Plan, family: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if state == "finished":
        run(plan, out, workers=0)
    else:
        run_until(plan, out, 4)
    before = list_files(out)
    other = plan_merge(method, family, **options)  # type: ignore[arg-type]
    with refused(OutputError, rf"holds another merge, which differs in [^;]*{difference}.*; choose another folder", 2):
        run(other, out, workers=0)
    after = list_files(out)
    assert before.pop(".mergemill/lock") == after.pop(".mergemill/lock") == b""
    assert after == before
    assert run(plan, out, workers=0).digest == plan.digest


def test_a_record_that_is_damaged_is_refused(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(plan, out, 4)
    (out / ".mergemill" / "plan.json").write_bytes(b'{"digest": ')
    with refused(OutputError, r"plan\.json: is damaged, or not of this version of mergemill", 2):
        run(plan, out, workers=0)


def test_memory_that_cannot_do_is_refused_with_the_number_that_would(plan: Plan, tmp_path: Path) -> None:
    with refused(PlanError, r"--memory 1.0 MiB is too little: tensor .* needs \d+ bytes", 2):
        run(plan, tmp_path / "out", workers=0, memory="1MiB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "README.md", SHARD, "model.safetensors.index.json"])
def test_a_file_that_appears_during_the_merge_is_not_overwritten(name: str, plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 2:
            (out / name).write_bytes(b"mine")

    with refused(OutputError, f"{name}: appeared while the merge ran; move it away and run the merge again", 2):
        run(plan, out, workers=0, on_event=appear)
    assert (out / name).read_bytes() == b"mine"
    with refused(OutputError, f"{name}: appeared while the merge ran", 2):
        run(plan, out, workers=0)
    assert (out / name).read_bytes() == b"mine"
    (out / name).rename(tmp_path / "mine")
    assert run(plan, out, workers=0).redone_parts == 0
    run(plan, tmp_path / "expected", workers=0)
    assert hash_output(out) == hash_output(tmp_path / "expected")


# --- the sources ---


def test_a_truncated_shard_is_refused_at_planning(own_family: Path) -> None:
    source = own_family / "B" / "model.safetensors"
    os.truncate(source, source.stat().st_size - 1)
    with refused(HeaderError, "B/model.safetensors", 2):
        plan_merge("linear", own_family)


@pytest.mark.parametrize("change", ["truncated", "touched", "gone"])
def test_a_source_that_changed_since_the_plan_stops_the_run_before_it_begins(
    change: str, own_family: Path, tmp_path: Path
) -> None:
    plan = plan_merge("linear", own_family)
    source = own_family / "B" / "model.safetensors"
    if change == "truncated":
        os.truncate(source, source.stat().st_size - 1)
    elif change == "touched":
        os.utime(source, ns=(1, 1))
    else:
        source.unlink()
    words = (
        "it was there when the plan was made" if change == "gone" else "changed since the plan was made: .*; plan again"
    )
    with refused(SourceChanged, f"B/model.safetensors: .*{words}", 1):
        run(plan, tmp_path / "out", workers=0)
    assert not list((tmp_path / "out").rglob("*.safetensors*"))
    assert not is_loadable(tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("change", ["replaced", "linked"])
def test_a_source_of_the_same_size_and_time_is_not_resumed_with(
    change: str, name: str, own_family: Path, tmp_path: Path
) -> None:
    """As `cp -p` or `rsync -t` leave it; a hard link looks the same from outside, which the error says."""
    run_until(plan_merge("linear", own_family), tmp_path / "out", 3)
    source = own_family / "A" / name
    found = source.stat()
    if change == "linked":
        (tmp_path / "link").hardlink_to(source)
    else:
        (tmp_path / "other").write_bytes(source.read_bytes()[:-1] + b" ")
        (tmp_path / "other").replace(source)
        os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))
    words = rf"differs in the sources \({source}: its ctime(, inode)? differ and its mtime does not, .*a hard link do"
    with refused(OutputError, words, 2):
        run(plan_merge("linear", own_family), tmp_path / "out", workers=0)
    assert not is_loadable(tmp_path / "out")


def test_a_merge_of_an_earlier_version_says_that_less_was_noted(own_family: Path, tmp_path: Path) -> None:
    plan = plan_merge("linear", own_family)
    run_until(plan, tmp_path / "out", 3)
    path = tmp_path / "out" / ".mergemill" / "plan.json"
    record = json.loads(path.read_text())
    sources = {name: [size, stamp.partition(" ")[0]] for name, (size, stamp) in record["sources"].items()}
    path.write_text(json.dumps(record | {"digest": "0" * 64, "sources": sources}))
    with refused(OutputError, r"differs in the sources \(.*: an earlier version of mergemill.*noted less of it", 2):
        run(plan, tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("workers", "change"), [(0, "rewritten"), (0, "replaced"), (0, "truncated"), (0, "gone"), (1, "rewritten")]
)
def test_a_source_that_changes_in_the_middle_of_a_run_stops_it(
    workers: int, change: str, own_family: Path, tmp_path: Path
) -> None:
    """Workers have the file open by then: a change in place moves no descriptor, a replaced file is not seen by it."""
    plan = plan_merge("linear", own_family)
    source = own_family / "B" / "model.safetensors"
    out = tmp_path / "out"

    def disturb(event: Event) -> None:
        if not isinstance(event, PartFinished) or event.parts_done != 3:
            return
        if change == "rewritten":
            with open(source, "r+b") as file:
                file.seek(-1_000_000, 2)
                file.write(bytes(1_000_000))
        elif change == "replaced":
            (tmp_path / "other").write_bytes(source.read_bytes())
            (tmp_path / "other").replace(source)
        elif change == "truncated":
            os.truncate(source, 100_000)
        else:
            source.unlink()

    with slowed(0.03), refused(SourceChanged, "B/model.safetensors: .*(changed|ends at byte|was there)", 1):
        run(plan, out, workers=workers, threads=1, on_event=disturb)
    assert not is_loadable(out)
    assert 3 <= len(list(FolderOutput(out).journal.read())) < len(plan.parts)


def test_a_tokenizer_that_changes_in_the_middle_of_a_run_is_not_copied(own_family: Path, tmp_path: Path) -> None:
    plan = plan_merge("linear", own_family)

    def disturb(event: Event) -> None:
        if isinstance(event, Started):
            (own_family / "A" / "tokenizer.json").write_text("{}")

    with refused(SourceChanged, "A/tokenizer.json: changed since the plan was made", 1):
        run(plan, tmp_path / "out", workers=0, on_event=disturb)
    assert not is_loadable(tmp_path / "out")


# --- giving up ---


def test_abort_removes_what_is_ours_and_the_folder(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(plan, out, 5)
    assert abort(out) > 100_000
    assert not out.exists()


def test_abort_leaves_a_merge_that_finishes_as_it_begins(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, locked = tmp_path / "out", FolderOutput.locked
    run_until(plan, out, 5)

    def finish_first(output: FolderOutput) -> AbstractContextManager[None]:
        monkeypatch.setattr(FolderOutput, "locked", locked)
        run(plan, out, workers=0)
        return locked(output)

    monkeypatch.setattr(FolderOutput, "locked", finish_first)
    with pytest.raises(OutputError, match="is a finished merge"):
        abort(out)
    assert is_loadable(out)


def test_abort_lets_no_other_merge_begin_before_it_has_ended(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, remove = tmp_path / "out", Beneath.remove
    run_until(plan, out, 5)
    refused: list[str] = []

    def try_first(files: Beneath, name: str) -> None:
        if files.root == out and name.startswith(".mergemill/"):
            with pytest.raises(OutputError, match="another mergemill is writing here"):
                run(plan, out, workers=0)
            refused.append(name)
        remove(files, name)

    with monkeypatch.context() as patch:
        patch.setattr(Beneath, "remove", try_first)
        abort(out)
    assert refused[-2:] == [".mergemill/plan.json", ".mergemill/lock"]
    assert not out.exists()


def test_abort_keeps_a_file_that_the_user_added(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(plan, out, 5)
    for name in ("notes.txt", SHARD, "config.json", "tokenizer.json"):
        (out / name).write_bytes(b"mine")
    abort(out)
    assert list_files(out) == dict.fromkeys(("notes.txt", SHARD, "config.json", "tokenizer.json"), b"mine")
    assert not (out / ".mergemill").exists()


def test_abort_after_an_interrupted_commit_removes_the_renamed_shards_too(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge("linear", family, shard_size="1MB")
    out = tmp_path / "out"

    def fail(files: Beneath, name: str, data: Any, **options: Any) -> None:
        if name == "config.json":
            files.place(f".mergemill/.{name}.tmp-0123abcd").write_bytes(b'{"archi')  # as kill -9 leaves it
            raise StorageError("no more")
        write(files, name, data, **options)

    write = Beneath.write
    with monkeypatch.context() as patch:
        patch.setattr(Beneath, "write", fail)
        with pytest.raises(StorageError, match="no more"):
            run(plan, out, workers=0)
    assert len(list(out.glob("*.safetensors"))) == len(plan.shards)
    (out / "notes.txt").write_bytes(b"mine")
    abort(out)
    assert list_files(out) == {"notes.txt": b"mine"}


def test_an_abort_that_is_interrupted_can_be_repeated(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge("linear", family, shard_size="1MB")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append_commit", no_more)
        with pytest.raises(StorageError, match="no more"):
            run(plan, out, workers=0)
    assert is_loadable(out)
    remove, left = Beneath.remove, [0]
    removed = 0
    while out.exists():
        left[0] = removed = removed + 1

        def remove_some(files: Beneath, name: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            remove(files, name)

        with monkeypatch.context() as patch:
            patch.setattr(Beneath, "remove", remove_some)
            try:
                abort(out)
            except KeyboardInterrupt:
                assert not is_loadable(out), "the index goes first"
        assert removed < 20
    assert removed > 3


def no_more(journal: Journal) -> None:
    raise StorageError("no more")


def test_abort_refuses_a_finished_merge(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan, out, workers=0)
    before = list_files(out)
    with refused(OutputError, "out: is a finished merge; remove the folder yourself", 2):
        abort(out)
    assert list_files(out) == before
    assert inspect(out).state == "finished"


@pytest.mark.parametrize("there", [True, False])
def test_abort_refuses_a_folder_that_is_no_merge(there: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"mine")
    with refused(OutputError, "holds no unfinished merge; there is nothing to abort", 2):
        abort(out)
    assert (out / "model.safetensors").exists() == there


def test_an_unfinished_merge_says_how_far_it_is(plan: Plan, tmp_path: Path) -> None:
    run_until(plan, tmp_path / "out", 5)
    assert inspect(tmp_path / "out").state == f"unfinished: 5 of {len(plan.parts)} parts"


def test_a_gone_source_is_refused_at_planning(own_family: Path) -> None:
    shutil.rmtree(own_family / "B")
    with pytest.raises(InputError, match="B"):
        plan_merge("linear", own_family)


def test_a_bit_of_a_header_flipped_before_the_plan_is_refused(own_family: Path) -> None:
    flip_bit(own_family / "B" / "model.safetensors", 6)
    with refused(HeaderError, "B/model.safetensors", 2):
        plan_merge("linear", own_family)
