"""What is not mergemill's in or behind an output's folder is neither written nor removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs.merging import Killed, list_files, plan_merge, run_until

from mergemill.engine import abort, run, status
from mergemill.engine.errors import MergemillError, OutputError, StorageError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.receipts import Journal
from mergemill.engine.storage.beneath import Beneath

SHARD = "model-00001-of-00001.safetensors"
FOREIGN = "holds 'thesis.tex' and no plan of a merge, so it is not taken for one of mergemill's"


@pytest.fixture(scope="module")
def plan(family: Path) -> Plan:
    return plan_merge("linear", family)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    return folder


@pytest.mark.parametrize("whole", [False, True], ids=["of another's", "with a merge behind it"])
def test_a_linked_state_folder_is_not_followed(whole: bool, plan: Plan, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if whole:
        run_until(plan, tmp_path / "other", 3)
        home = tmp_path / "other" / ".mergemill"
    out.mkdir()
    (out / ".mergemill").symlink_to(home)
    before = list_files(home)
    for refused in (lambda: abort(out), lambda: run(plan, out, workers=0), lambda: status(out)):
        with pytest.raises(OutputError, match=r"\.mergemill.*: is a link, or lies behind one"):
            refused()
    assert list_files(home) == before


def test_a_state_folder_of_anothers_is_neither_emptied_nor_used(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".mergemill").mkdir(parents=True)
    (out / ".mergemill" / "thesis.tex").write_text("precious")
    for refused in (lambda: abort(out), lambda: run(plan, out, workers=0)):
        with pytest.raises(OutputError, match=FOREIGN):
            refused()
    assert list_files(out) == {".mergemill/thesis.tex": b"precious"}


def test_abort_keeps_what_the_plan_does_not_name_in_the_state_folder(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_until(plan, out, 3)
    kept = {".mergemill/thesis.tex": b"1", ".mergemill/weights.safetensors.tmp-0123456789ab": b"2"}
    for name, data in kept.items():
        (out / name).write_bytes(data)
    abort(out)
    assert list_files(out) == kept


@pytest.mark.parametrize("name", ["lock", "journal.jsonl", "plan.json", f"{SHARD}.tmp-digest"])
def test_no_link_in_the_state_folder_is_written_through(name: str, plan: Plan, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    (out / ".mergemill").mkdir(parents=True)
    victim.write_text("precious")
    (out / ".mergemill" / name.replace("digest", plan.digest[:12])).symlink_to(victim)
    with pytest.raises(OutputError, match="is a link, or lies behind one"):
        run(plan, out, workers=0)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", [".plan.json.tmp", ".driver.json.tmp"])
def test_links_in_place_of_half_written_notes_change_nothing(name: str, plan: Plan, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    (out / ".mergemill").mkdir(parents=True)
    victim.write_text("precious")
    (out / ".mergemill" / name).symlink_to(victim)
    run(plan, out, workers=0)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", [SHARD, "config.json", ".config.json.tmp", "model.safetensors.index.json"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_commit_writes_through_no_link_named_like_its_files(
    dangling: bool, name: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    run_until(plan, out, 3)
    if not dangling:
        victim.write_text("precious")
    (out / name).symlink_to(victim)
    if name.startswith("."):
        run(plan, out, workers=0)
    else:
        with pytest.raises(OutputError, match="appeared while the merge ran; move it away"):
            run(plan, out, workers=0)
    assert (victim.read_text() if victim.exists() else None) == (None if dangling else "precious")
    assert (out / name).is_symlink()


def test_abort_of_an_interrupted_commit_keeps_links_and_what_they_lead_to(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fail(journal: Journal) -> None:
        raise StorageError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append_commit", fail)
        with pytest.raises(StorageError, match="no more"):
            run(plan, out, workers=0)
    (out / "config.json").rename(tmp_path / "config.json")
    (out / "config.json").symlink_to(tmp_path / "config.json")
    abort(out)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").exists()


def test_a_state_folder_that_becomes_a_link_in_mid_run_ends_the_merge(plan: Plan, home: Path, tmp_path: Path) -> None:
    out, swapped = tmp_path / "out", []

    def swap(event: object) -> None:
        if not swapped:
            swapped.append(event)
            (out / ".mergemill").rename(tmp_path / "away")
            (out / ".mergemill").symlink_to(home)

    with pytest.raises(MergemillError):
        run(plan, out, workers=0, on_event=swap)
    assert list_files(home) == {"thesis.tex": b"precious"}
    assert not (out / "model.safetensors.index.json").exists()


def test_a_driver_that_was_killed_before_its_plan_is_aborted(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose workers never came: there is a lock, and a note of its driver."""
    out = tmp_path / "out"

    def die(*args: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Beneath, "rename", die)
        with pytest.raises(Killed):
            run(plan, out, workers=0)
    assert (out / ".mergemill" / "lock").exists()
    abort(out)
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_state_folder_that_is_anothers_alone_is_refused_with_whose_it_is(tmp_path: Path) -> None:
    state = tmp_path / "out" / ".mergemill"
    state.mkdir(parents=True)
    state.chmod(0o700)
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from mergemill.engine.errors import StorageError\n"
        "from mergemill.engine.storage.beneath import Beneath\n"
        "os.setuid(12345)\n"
        "try: Beneath(Path('out')).read('.mergemill/plan.json')\n"
        "except StorageError as error: print(error)\n"
    )
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent, tmp_path / "out"):
        folder.chmod(0o755)
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.startswith("out/.mergemill/plan.json: looking at this file failed: Permission denied; "), said
    assert "out belongs to user 0, who can go on with it" in said.stdout


@pytest.mark.parametrize("name", ["driver.json", "journal.jsonl", "plan.json"])
def test_a_folder_where_a_note_belongs_is_told_with_what_to_do(name: str, tmp_path: Path) -> None:
    files = Beneath(tmp_path)
    (tmp_path / ".mergemill" / name).mkdir(parents=True)
    with pytest.raises(OutputError, match=rf"{name}: is a folder, where mergemill has files only; move it away"):
        files.remove(f".mergemill/{name}")
