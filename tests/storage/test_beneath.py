"""Files below a folder: nothing is reached through a link, and small files appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.storage.beneath import Beneath

USES: dict[str, Callable[[Beneath, str], object]] = {
    "open to read": lambda files, name: os.close(files.open(name, os.O_RDONLY)),
    "open to write": lambda files, name: os.close(files.open(name, os.O_WRONLY)),
    "open to create": lambda files, name: os.close(files.open(name, os.O_WRONLY | os.O_CREAT)),
    "read": lambda files, name: files.read(name),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with ``home/thesis`` beside it, and a link to each in it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_bytes(b"precious")
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").symlink_to("../home/thesis")
    (root / "folder").symlink_to("../home")
    return root


@pytest.mark.parametrize("name", ["file", "folder/thesis"])
@pytest.mark.parametrize("use", USES)
def test_no_link_is_followed(use: str, name: str, folder: Path) -> None:
    with pytest.raises(OutputError, match="is a link, or lies behind one, and mergemill follows none"):
        USES[use](Beneath(folder), name)
    assert (folder / "file").read_bytes() == b"precious"


def test_writing_where_a_link_is_replaces_the_link(folder: Path) -> None:
    Beneath(folder).write("file", b"mine", beside=".")
    assert (folder / "file").read_bytes() == b"mine"
    assert not (folder / "file").is_symlink()
    assert (folder.parent / "home" / "thesis").read_bytes() == b"precious"


def test_removing_a_link_keeps_what_it_leads_to(folder: Path) -> None:
    Beneath(folder).remove("file")
    assert os.listdir(folder) == ["folder"]  # noqa: PTH208
    assert (folder.parent / "home" / "thesis").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files.write("folder/thesis", b"mine", beside="."),
        lambda files: files.write("plain", b"mine", beside="folder"),
        lambda files: files.remove("folder/thesis"),
        lambda files: files.rename("folder/thesis", "thesis"),
        lambda files: files.list_names("folder"),
        lambda files: files.make_folder("folder/new"),
        lambda files: files.make_folder("folder"),
        lambda files: files.find_folder("folder"),
        lambda files: files.remove_folder("folder"),
    ],
)
def test_nothing_behind_a_linked_folder_is_touched(change: Callable[[Beneath], object], folder: Path) -> None:
    with pytest.raises(OutputError, match="is a link"):
        change(Beneath(folder))
    assert [path.name for path in (folder.parent / "home").iterdir()] == ["thesis"]
    assert sorted(path.name for path in folder.iterdir()) == ["file", "folder"]


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    Beneath(tmp_path / "link").write("a/b/file", b"mine", beside=".")
    assert (tmp_path / "disk" / "a" / "b" / "file").read_bytes() == b"mine"


def test_a_file_with_a_second_name_is_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"precious")
    os.link(tmp_path / "theirs", tmp_path / "file")
    files = Beneath(tmp_path)
    assert files.read("file") == b"precious"
    with pytest.raises(OutputError, match=r"has a second name \(a hard link\); mergemill does not write into it"):
        files.open("file", os.O_WRONLY)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_a_fifo_in_a_files_place_is_refused_at_once(flags: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(OutputError, match="is no regular file"):
        Beneath(tmp_path).open("file", flags)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    for files in (Beneath(tmp_path), Beneath(tmp_path / "none")):
        assert (files.find("a/b"), files.read("a/b"), files.list_names("a"), files.find_folder("a")) == (
            None,
            None,
            [],
            False,
        )
        files.remove("a/b")
        files.remove_folder("a")
        with pytest.raises(StorageError, match="a/b: opening this file failed: No such file or directory"):
            files.open("a/b", os.O_RDONLY)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Beneath(tmp_path)
    files.write("file", b"first", beside=".")

    def fail(number: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="file: writing this file failed: Input/output error"):
            files.write("file", b"second, torn", beside=".")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"first"}


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    files = Beneath(tmp_path)
    files.write("a/file", b"mine", beside=".")
    files.remove_folder("a")
    assert files.read("a/file") == b"mine"
    files.remove("a/file")
    files.remove_folder("a")
    assert not files.find_folder("a")


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b"])
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="outside of the folder"):
        Beneath(tmp_path).find(name)


def test_pieces_are_written_and_read_one_after_the_other(tmp_path: Path) -> None:
    files = Beneath(tmp_path)
    files.write("a", iter([b"1", b"23"]), beside=".", synced=False)
    assert b"".join(files.read_pieces("a")) == b"123"


def test_a_note_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "driver.json").touch()
    os.truncate(tmp_path / "driver.json", 1 << 40)
    with pytest.raises(StorageError, match=r"driver.json: has more than 1048576 bytes, as no such file of mergemill"):
        Beneath(tmp_path).read("driver.json")
