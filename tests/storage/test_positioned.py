"""Writing by positions: any order, any number of writers, whole or not at all."""

import itertools
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.storage import positioned
from mergemill.engine.storage.positioned import (
    PositionedWriter,
    check_space,
    create_positioned,
    make_folder,
    open_positioned,
    rename_file,
    write_file,
)


def test_a_created_file_has_its_full_size_and_begins_with_its_prefix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    create_positioned(path, 1000, b"header")
    assert path.read_bytes() == b"header" + bytes(994)


def test_creating_again_keeps_what_lies_behind_the_prefix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"xxxxxxdata of a part, and more")
    create_positioned(path, 10, b"header")
    assert path.read_bytes() == b"headerdata"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ranges_written_in_any_order_by_many_writers_make_the_whole(data: st.DataObject, tmp_path: Path) -> None:
    whole = data.draw(st.binary(min_size=1, max_size=300))
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole))))})
    ranges = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    create_positioned(path, len(whole), b"")
    writers = [PositionedWriter(path) for _ in range(3)]
    for i, (start, stop) in enumerate(ranges):
        writers[i % 3].write(start, memoryview(whole)[start:stop])
    for writer in writers:
        writer.sync()
        writer.close()
    assert path.read_bytes() == whole


def test_a_write_that_the_kernel_takes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    create_positioned(path, 100, b"")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda number, data, offset: pwrite(number, data[:7], offset))
    with open_positioned(path) as writer:
        writer.write(3, memoryview(bytes(range(90))))
    assert path.read_bytes() == bytes(3) + bytes(range(90)) + bytes(7)


def test_opening_what_was_never_created_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none: opening this file failed: No such file"):
        PositionedWriter(tmp_path / "none")


def test_a_failed_write_says_where(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    writer = PositionedWriter(Path("/dev/full"))
    with pytest.raises(StorageError, match="/dev/full: writing at byte 512 of this file failed: No space left"):
        writer.write(512, memoryview(b"x"))
    writer.close()


def test_a_small_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "config.json"
    write_file(path, b"first")
    assert path.read_bytes() == b"first"

    def fail(number: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match=r"config\.json: writing this file failed: Input/output error"):
            write_file(path, b"second, torn")
    assert path.read_bytes() == b"first"
    write_file(path, b"third")
    assert path.read_bytes() == b"third"
    assert [found.name for found in path.parent.iterdir()] == ["config.json"]


def test_a_reader_never_sees_half_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([i]) * 50_000 for i in range(2)]
    write_file(path, contents[0])
    over = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not over.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        write_file(path, contents[i % 2])
    over.set()
    reader.join()
    assert seen <= set(contents)


def test_renaming_to_where_nothing_can_be_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(StorageError, match="renaming to this file failed"):
        rename_file(path, tmp_path / "none" / "file")
    assert path.read_bytes() == b"x"


def test_too_little_space_says_how_much_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(tmp_path)
    fields = list(found)
    fields[0] = fields[1] = 4096  # f_bsize, f_frsize
    fields[4] = 10  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda folder: os.statvfs_result(fields))
    check_space(tmp_path, 40960)
    with pytest.raises(StorageError, match="disk too full: 40961 bytes are needed, 40960 are free; free 1 bytes"):
        check_space(tmp_path, 40961)


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OutputError, match="cannot be created: Not a directory; choose a folder that you can write"):
        make_folder(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positioned.os, "access", lambda folder, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match="cannot be written: permission denied"):
        make_folder(tmp_path)
