"""Ranged reads: exactly the bytes asked for, of exactly the file that was pinned."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergemill.engine.errors import CheckpointError, SourceChanged, StorageError
from mergemill.engine.storage import local, stamps, system
from mergemill.engine.storage.ranges import Pin, check_pin, close_all, pin_file, read_ahead, read_into

CONTENT = bytes(i * 7 % 251 for i in range(10_000))


@pytest.fixture
def pin(tmp_path: Path) -> Iterator[Pin]:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    yield pin_file(path)
    close_all()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_read_fills_the_buffer_with_its_range_and_nothing_beside(data: st.DataObject, pin: Pin) -> None:
    start = data.draw(st.integers(0, len(CONTENT)))
    stop = data.draw(st.integers(start, len(CONTENT)))
    buffer = bytearray(b"\xff" * (stop - start + 16))
    read_into(pin, start, memoryview(buffer)[8 : 8 + stop - start])
    assert buffer == b"\xff" * 8 + CONTENT[start:stop] + b"\xff" * 8


def test_a_read_longer_than_one_call_takes_is_whole(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PIECE_BYTES", 999)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, buffers, at: preadv(number, [buffers[0][:250]], at))
    buffer = bytearray(9_000)
    read_into(pin, 1_000, memoryview(buffer))
    assert buffer == CONTENT[1_000:]


def test_a_read_past_the_end_says_where_the_file_ends(pin: Pin) -> None:
    with pytest.raises(SourceChanged, match="ends at byte 10000; it was 10000 bytes at planning"):
        read_into(pin, 9_990, memoryview(bytearray(20)))


def test_a_file_cut_short_while_it_is_open_is_an_error(pin: Pin) -> None:
    read_into(pin, 0, memoryview(bytearray(10)))
    os.truncate(pin.url, 5_000)
    with pytest.raises(SourceChanged, match="ends at byte 5000; it was 10000 bytes at planning"):
        read_into(pin, 4_000, memoryview(bytearray(2_000)))


@pytest.mark.parametrize("change", ["longer", "touched", "replaced", "gone"])
def test_a_file_that_changed_since_it_was_pinned_is_not_read(change: str, pin: Pin) -> None:
    path = Path(pin.url)
    if change == "longer":
        path.write_bytes(CONTENT + b"x")
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "replaced":
        path.with_name("other").write_bytes(bytes(10_000))
        os.utime(path.with_name("other"), ns=(2, 2))
        path.with_name("other").replace(path)
    else:
        path.unlink()
    words = (
        "it was there when the plan was made" if change == "gone" else "changed since the plan was made: 10000 bytes"
    )
    for use in (check_pin, lambda pin: read_into(pin, 0, memoryview(bytearray(4)))):
        with pytest.raises(SourceChanged, match=words):
            use(pin)


def test_a_change_is_found_when_the_file_is_asked_about_again(pin: Pin) -> None:
    check_pin(pin)
    os.utime(pin.url, ns=(1, 1))
    with pytest.raises(
        SourceChanged, match=r"mtime_ns:1 ctime_ns:\d+ inode:\d+: its mtime, ctime differ now; plan again"
    ):
        check_pin(pin)


def put_back_times(path: Path, found: os.stat_result) -> None:
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replace_file(path: Path) -> None:
    """Put another file of the same size and time there, as `cp -p` or `rsync -t` do."""
    found, other = path.stat(), path.with_name("other")
    other.write_bytes(bytes(len(CONTENT)))
    other.replace(path)
    put_back_times(path, found)


def write_in_place(path: Path) -> None:
    found = path.stat()
    with open(path, "r+b") as file:
        file.write(bytes(len(CONTENT)))
    put_back_times(path, found)


def link_elsewhere(path: Path) -> None:
    path.with_name("link").hardlink_to(path)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "change",
    [replace_file, write_in_place, link_elsewhere, lambda path: path.chmod(0o600)],
    ids=lambda each: each.__name__,
)
def test_a_file_of_the_same_size_and_time_is_not_taken_for_the_one_that_was_pinned(
    change: Callable[[Path], None], opened: bool, pin: Pin
) -> None:
    """What changes no byte cannot be told from it, and says so."""
    if opened:
        read_into(pin, 0, memoryview(bytearray(4)))
    change(Path(pin.url))
    for use in (check_pin, lambda pin: read_into(pin, 0, memoryview(bytearray(4)))):
        with pytest.raises(SourceChanged, match=r"ctime.* and its mtime does not, .* cannot be told from it now; plan"):
            use(pin)


def test_where_numbers_are_made_up_a_sample_of_the_content_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE may number a file anew each time that it is asked."""
    path = tmp_path / "source"
    path.write_bytes(CONTENT * 40)
    found = path.stat()
    mounts = tmp_path / "self/mountinfo"
    mounts.parent.mkdir()
    device = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
    mounts.write_text(f"36 35 {device} / /mnt rw,noatime master:1 - fuse.sshfs host:/ rw\n")
    monkeypatch.setattr(system, "PROC", tmp_path)
    stamps._makes_up.cache_clear()
    pin = pin_file(path)
    stamps._makes_up.cache_clear()
    monkeypatch.undo()  # another host may mount it differently
    assert "inode" not in pin.stamp
    path.with_name("link").hardlink_to(path)
    read_into(pin, 0, memoryview(bytearray(4)))
    check_pin(pin)
    for at in (0, 200_000, 399_999):
        changed = bytearray(CONTENT * 40)
        changed[at] ^= 1
        path.write_bytes(changed)
        put_back_times(path, found)
        with pytest.raises(SourceChanged, match="its sample differ now; plan again"):
            check_pin(pin)


def test_pinning_what_is_not_there_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: cannot be read: No such file"):
        pin_file(tmp_path / "none")


def test_a_pin_names_the_file_behind_a_link(tmp_path: Path, pin: Pin) -> None:
    (tmp_path / "link").symlink_to(pin.url)
    assert pin_file(tmp_path / "link") == pin


def test_a_failed_read_says_where(pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int, buffers: object, at: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match="source: reading at byte 77: Input/output error"):
        read_into(pin, 77, memoryview(bytearray(4)))


def test_a_file_keeps_one_descriptor_until_all_are_closed(pin: Pin) -> None:
    close_all()
    before = open_descriptors()
    for offset in range(50):
        read_into(pin, offset, memoryview(bytearray(4)))
        read_ahead(pin, offset, 100)
    assert open_descriptors() == before + 1
    close_all()
    assert open_descriptors() == before


def test_reading_ahead_of_nothing_opens_nothing(pin: Pin) -> None:
    close_all()
    before = open_descriptors()
    read_ahead(pin, 0, 0)
    assert open_descriptors() == before


def test_threads_that_open_a_file_at_once_all_read_it(tmp_path: Path) -> None:
    """Of the descriptors that they open only one is kept: the others must live while they are used."""
    errors: list[Exception] = []

    def read(pins: list[Pin], start: threading.Barrier) -> None:
        for pin in pins:
            start.wait()
            try:
                read_ahead(pin, 0, pin.size_bytes)
                buffer = bytearray(pin.size_bytes)
                read_into(pin, 0, memoryview(buffer))
                assert buffer == CONTENT
            except (OSError, AssertionError) as error:
                errors.append(error)

    pins = []
    for i in range(150):
        (tmp_path / f"{i}").write_bytes(CONTENT)
        pins.append(pin_file(tmp_path / f"{i}"))
    close_all()
    start = threading.Barrier(8)
    readers = [threading.Thread(target=read, args=(pins, start)) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    close_all()
    assert errors == []
