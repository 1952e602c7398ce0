"""``--overwrite``: a finished merge of ours gives way to another, and nothing else ever does."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from models import write_llama
from runs.merging import Killed, hash_output, is_loadable, list_files, plan_merge, run_until

from mergemill.engine import abort, attach, cancel, make_plan, run, status, verify
from mergemill.engine.errors import Cancelled, OutputError, RunError, StorageError
from mergemill.engine.plan.small_files import RECIPE_NAME
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs import running
from mergemill.engine.runs.driver import LOOK_S
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.output import find_output, is_replaced
from mergemill.engine.runs.outputs.replaced import check_sources
from mergemill.engine.runs.outputs.whole import WholeOutput
from mergemill.engine.storage import positioned
from mergemill.engine.storage.beneath import Beneath

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``base``, ``A`` and ``B``, small ones. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "A", "B")):
        write_llama(folder / name, seed=seed, layers=1)
    return folder


@pytest.fixture(scope="module")
def plans(models: Path) -> Sequence[Plan]:
    """The merge that is there, and the one that is wanted."""
    return plan_merge("linear", models), plan_merge("ties", models, shard_size="tensor")


@pytest.fixture(scope="module")
def finished(plans: Sequence[Plan], tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Both, merged into folders of their own. Not to be changed."""
    folders = [tmp_path_factory.mktemp(name) / "out" for name in ("first", "second")]
    for plan, folder in zip(plans, folders, strict=True):
        run(plan, folder, workers=0)
    return folders


@pytest.fixture
def out(finished: Sequence[Path], tmp_path: Path) -> Path:
    """The finished merge, to be replaced."""
    return shutil.copytree(finished[0], tmp_path / "out")


def overwrite(plan: Plan, out: Path | str, **options: Any) -> None:
    run(plan, out, workers=0, overwrite=True, **options)


def test_a_finished_merge_gives_way_and_only_where_that_is_asked(
    plans: Sequence[Plan], finished: Sequence[Path], out: Path
) -> None:
    with pytest.raises(
        OutputError, match=r"that one is finished; choose another folder, or replace it with --overwrite"
    ):
        run(plans[1], out, workers=0)
    assert list_files(out) == list_files(finished[0])
    overwrite(plans[1], out)
    assert hash_output(out) == hash_output(finished[1])
    assert verify(out).shards == len(plans[1].shards)


def test_the_same_merge_is_not_done_again(plans: Sequence[Plan], out: Path) -> None:
    before = list_files(out)
    overwrite(plans[0], out)
    assert list_files(out) == before


def test_a_finished_merge_of_which_something_is_gone_is_done_again(
    plans: Sequence[Plan], finished: Sequence[Path], out: Path
) -> None:
    (out / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(RunError, match=r"is gone; merge again with --overwrite"):
        run(plans[0], out, workers=0)
    overwrite(plans[0], out)
    assert hash_output(out) == hash_output(finished[0])


def add_file(out: Path) -> None:
    (out / "notes").mkdir()
    (out / "notes" / "thesis.tex").write_text("mine")


def add_link(out: Path) -> None:
    (out / "elsewhere").symlink_to(out.parent)


def change_card(out: Path) -> None:
    (out / "README.md").write_text("mine")


def change_shard(out: Path) -> None:
    with open(out / "model-00001-of-00001.safetensors", "ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (add_file, "'notes/thesis.tex' is no file of the merge"),
        (add_link, "'elsewhere' is no file of the merge"),
        (change_card, "'README.md' was changed since"),
        (change_shard, "'model-00001-of-00001.safetensors' was changed since"),
    ],
)
def test_what_is_not_ours_is_a_reason_to_refuse(
    plans: Sequence[Plan], out: Path, change: Callable[[Path], None], why: str
) -> None:
    change(out)
    before = list_files(out)
    with pytest.raises(OutputError, match=why):
        overwrite(plans[1], out)
    assert list_files(out) == before


def test_neither_an_unfinished_merge_nor_a_folder_of_others_gives_way(
    plans: Sequence[Plan], models: Path, tmp_path: Path
) -> None:
    run_until(plans[1], tmp_path / "out", 2)
    with pytest.raises(OutputError, match=r"holds another merge.*mergemill abort"):
        overwrite(plans[0], tmp_path / "out")
    with pytest.raises(OutputError, match="the output must be a folder, new or empty"):
        overwrite(plans[1], shutil.copytree(models / "A", tmp_path / "copy"))


def test_a_source_is_not_replaced_by_what_is_made_of_it(plans: Sequence[Plan], models: Path) -> None:
    with pytest.raises(OutputError, match="is a source of this merge, which would replace it"):
        check_sources(plans[0], str(models / "A"))
    check_sources(plans[0], str(models / "AA"))


def test_neither_is_a_source_that_is_written_otherwise(models: Path, out: Path, tmp_path: Path) -> None:
    before = list_files(out)
    (tmp_path / "link").symlink_to(out)
    linked = shutil.copytree(models / "A", tmp_path / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").hardlink_to(out / "model-00001-of-00001.safetensors")
    for source, place in [
        (f"local://{out}", str(out)),
        (str(out), f"local://{out}"),
        (str(out), str(tmp_path / "link")),
        (str(linked), str(out)),
    ]:
        recipe = {"merge_method": "passthrough", "models": [{"model": source}]}
        with pytest.raises(OutputError, match="is a source of this merge"):
            overwrite(make_plan(recipe), place)
        assert list_files(out) == before


def test_a_recipe_and_its_methods_are_not_removed_with_what_they_made(models: Path, out: Path) -> None:
    before = list_files(out)
    with pytest.raises(OutputError, match=r"recipe\.yml: lies in .*/out, which --overwrite removes; copy it"):
        overwrite(make_plan(str(out / RECIPE_NAME), seed=7), out)
    assert list_files(out) == before
    own = out.parent / "own.py"
    own.write_text(
        "from torch import Tensor\n\nfrom mergemill.engine.methods import merge_method\n\n\n"
        "@merge_method(reads='element')\ndef own_first(models: list[Tensor]) -> Tensor:\n"
        '    """The first."""\n    return models[0]\n'
    )
    plan = make_plan({"merge_method": "passthrough", "models": [{"model": str(models / "A")}]}, methods=[str(own)])
    with pytest.raises(OutputError, match=r"own\.py: lies in .*, which --overwrite removes; copy it"):
        check_sources(plan, str(own.parent))
    check_sources(plan, str(out))


def test_of_a_finished_merge_whose_plan_is_damaged_no_abort_is_advised(plans: Sequence[Plan], out: Path) -> None:
    (out / ".mergemill" / "plan.json").write_text("{")
    with pytest.raises(
        OutputError, match=r"plan\.json: is damaged.*; it is of a finished merge: move the folder away$"
    ):
        overwrite(plans[1], out)
    (out / ".mergemill" / "journal.jsonl").write_text("")
    with pytest.raises(OutputError, match=r"an unfinished merge is given up with: mergemill abort .*/out$"):
        overwrite(plans[1], out)


def test_what_is_refused_late_leaves_it_whole(
    plans: Sequence[Plan], finished: Sequence[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list_files(out)
    with monkeypatch.context() as patch:
        patch.setattr(running, "open_crew", lambda *given: (_ for _ in ()).throw(RunError("no worker came")))
        with pytest.raises(RunError, match="no worker came"):
            overwrite(plans[1], out)
    with monkeypatch.context() as patch:
        patch.setattr(positioned.os, "statvfs", lambda place: type("Disk", (), {"f_bavail": 0, "f_frsize": 1}))
        with pytest.raises(StorageError, match="disk too full"):
            overwrite(plans[1], out)
    kept = {name: data for name, data in list_files(out).items() if name != ".mergemill/driver.json"}
    assert kept == {name: data for name, data in before.items() if name != ".mergemill/driver.json"}
    assert ".mergemill/driver.json" not in list_files(out)
    assert verify(out).shards == 1


def test_whenever_it_is_killed_the_same_command_goes_on_and_no_half_model_loads(
    plans: Sequence[Plan], finished: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = len(FolderOutput(finished[0]).list_replaced(plans[1])) + 3
    remove, clear = Beneath.remove, FolderOutput.clear
    for step in range(steps):
        out = shutil.copytree(finished[0], tmp_path / f"out-{step}")
        left = [step]

        def die(self: Beneath, name: str, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            remove(self, name)

        def clear_and_die(self: FolderOutput, plan: Plan, die: Callable[..., None] = die) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(Beneath, "remove", die)
                clear(self, plan)

        with monkeypatch.context() as patch:
            patch.setattr(FolderOutput, "clear", clear_and_die)
            try:
                overwrite(plans[1], out)
            except Killed:
                assert is_loadable(out) == (step == 0)
                if find_output(out).read_record() is not None:
                    assert is_replaced(find_output(out), plans[1])
        overwrite(plans[1], out)
        assert hash_output(out) == hash_output(finished[1])
    assert left[0] == 0, "the last step was not the last"


def test_at_each_step_of_a_kill_status_attach_and_abort_say_what_is_true(
    plans: Sequence[Plan], finished: Sequence[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, left = Beneath.remove, []

    def leave(self: Beneath, name: str) -> None:
        if name != ".mergemill/cancel" and len(left) < steps:
            left.append(shutil.copytree(out, out.parent / f"left-{len(left)}"))
        remove(self, name)

    steps = len(FolderOutput(finished[0]).list_replaced(plans[1])) + 2  # of the notes, the journal and the record
    with monkeypatch.context() as patch:
        patch.setattr(Beneath, "remove", leave)
        overwrite(plans[1], out)
    before = list_files(finished[0])
    for step, place in enumerate(left):
        assert status(place).state == "running", "its driver is this process"
        kill_driver(place)
        found = status(place)
        assert (found.state, found.parts, found.old) == ("unfinished", 0, "removed in part" if step else "whole")
        assert hash_output(place) == hash_output(finished[0]) if step == 0 else not is_loadable(place)
        with pytest.raises(RunError, match=f"as if killed; the finished merge there, .* is {found.old}; run it again"):
            attach(place)
        freed_bytes = abort(place)
        if step == 0:
            kept = {name: data for name, data in before.items() if name != ".mergemill/driver.json"}
            assert (freed_bytes, list_files(place)) == (0, kept)
            assert status(place).state == "finished"
        else:
            assert not place.exists()
    assert len(left) == steps


def kill_driver(out: Path) -> None:
    """Let the driver's note be of a process that has ended without a word."""
    note = out / ".mergemill" / "driver.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "began": "1"}))


def test_a_replacement_that_is_cancelled_before_it_begins_is_watched_and_told_as_such(
    plans: Sequence[Plan], finished: Sequence[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_crew, asked = running.open_crew, threading.Event()

    def open_late(*given: Any) -> Any:
        asked.wait(20)
        time.sleep(LOOK_S + 0.5)
        return open_crew(*given)

    monkeypatch.setattr(running, "open_crew", open_late)
    with ThreadPoolExecutor() as pool:
        driver = pool.submit(overwrite, plans[1], out)
        while status(out).state != "running":
            time.sleep(0.05)
        assert status(out).old == "whole"
        with pytest.raises(OutputError, match="another mergemill is writing here"):
            abort(out)
        watcher = pool.submit(attach, out)
        while not watcher.running():
            time.sleep(0.05)
        threading.Timer(0.5, asked.set).start()
        found = cancel(out)
        assert (found.state, found.old) == ("finished", "whole")
        assert isinstance(driver.exception(), Cancelled)
        assert "is whole; run it again, with --overwrite, to go on" in str(watcher.exception())
    assert hash_output(out) == hash_output(finished[0])


def test_a_driver_that_has_said_how_it_ended_and_not_yet_taken_its_note_back_replaces_nothing(
    plans: Sequence[Plan], finished: Sequence[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("no workers")

    monkeypatch.setattr(running, "open_crew", fail)
    with monkeypatch.context() as patch:
        patch.setattr(Beneath, "remove", lambda self, name: None)  # as if it was killed between the two
        with pytest.raises(RunError, match="no workers"):
            overwrite(plans[1], out)
    assert (out / ".mergemill" / "driver.json").exists()
    found = status(out)
    assert (found.state, found.old, found.driver) == ("finished", "", None)
    with pytest.raises(RunError, match=r"no workers.*is whole; run it again, with --overwrite, to go on"):
        attach(out)
    assert abort(out) == 0
    assert hash_output(out) == hash_output(finished[0])


def test_killed_after_that_it_is_an_unfinished_merge_like_any_other(
    plans: Sequence[Plan], finished: Sequence[Path], out: Path
) -> None:
    def stop(event: Any) -> None:
        if getattr(event, "parts_done", 0) == 2:
            raise RunError("stopped")

    with pytest.raises(RunError, match="stopped"):
        overwrite(plans[1], out, threads=1, on_event=stop)
    assert status(out).state == "unfinished"
    run(plans[1], out, workers=0)
    assert hash_output(out) == hash_output(finished[1])


def test_a_finished_merge_is_known_as_such_however_its_folder_is_named(
    plans: Sequence[Plan], out: Path, tmp_path: Path
) -> None:
    run(plans[0], f"local://{tmp_path}/other", workers=0)
    for folder, place in ((out, f"local://{out}"), (tmp_path / "other", str(tmp_path / "other"))):
        before = list_files(folder)
        with pytest.raises(OutputError, match="is a finished merge; remove the"):
            abort(place)
        with pytest.raises(OutputError, match="that one is finished"):
            run(plans[1], place, workers=0)
        left = {name: data for name, data in list_files(folder).items() if not name.endswith("/lock")}
        assert left == {name: data for name, data in before.items() if not name.endswith("/lock")}
        for lock in folder.glob(".mergemill/lock"):
            os.utime(lock, (0, 0))  # which counts for a while, where it is none of a disk
        overwrite(plans[1], place)
        assert verify(place).shards == len(plans[1].shards)


def clear_and_die(files: fsspec.AbstractFileSystem, place: str, note: str | None) -> None:
    """End as if killed when the index was removed, or later, when one of the notes was as well."""
    if note is None:
        files.rm(f"{place}/{INDEX}")
    else:
        files.rm(f"{place}/.mergemill/{note}")
    raise Killed


def test_objects_give_way_too(plans: Sequence[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"memory://overwrite-{tmp_path.name}/out"
    files = fsspec.filesystem("memory")
    run(plans[0], place, workers=0)
    files.pipe(f"{place}/mine.txt", b"mine")
    with pytest.raises(OutputError, match=r"'mine.txt' is no file of the merge"):
        overwrite(plans[1], place)
    files.rm(f"{place}/mine.txt")
    for left, way in ((None, "choose another folder, or replace it"), ("committed", "which was being replaced")):
        with monkeypatch.context() as patch:
            patch.setattr(WholeOutput, "clear", lambda *given, left=left: clear_and_die(files, place, left))
            with pytest.raises(Killed):
                overwrite(plans[1], place)
        assert (status(place).state, status(place).old) == ("unfinished", "removed in part")
        with pytest.raises(OutputError, match=way):
            run(plans[1], place, workers=0)
    assert abort(place) > 0
    assert not files.exists(place) or files.find(place) == []
    run(plans[0], place, workers=0)
    overwrite(plans[1], place)
    assert verify(place).shards == len(plans[1].shards)
    files.rm(place, recursive=True)
