"""What only some systems have may be absent, and Windows is refused by name."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from lacking import FULL_SYNC, as_on_macos

from mergemill.engine.storage import system
from mergemill.engine.storage.entry import file_bytes, read_entry, write_entry
from mergemill.engine.storage.ranges import pin_file

CONTENT = bytes(range(256)) * 8192


@pytest.mark.parametrize("system_here", [nullcontext, as_on_macos])
def test_reads_and_writes_by_position_are_whole(system_here: type, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file, system_here():
        system.write_at(file.fileno(), memoryview(CONTENT), 5)
        system.fetch_soon(file.fileno(), 0, 10)
        system.write_soon(file.fileno(), 0, 10)
        system.sync_content(file.fileno())
        buffer, done = memoryview(bytearray(len(CONTENT))), 0
        while got := system.read_at(file.fileno(), buffer[done:], 5 + done):
            done += got
    assert bytes(buffer) == CONTENT


def test_what_is_written_at_once_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS refuses 2 GiB in one call."""
    sizes = []

    def write(descriptor: int, data: memoryview, offset_bytes: int) -> int:
        sizes.append(len(data))
        return len(data)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(system, "WRITE_BYTES", 1000)
    system.write_at(0, memoryview(CONTENT[:2500]), 0)
    assert sizes == [1000, 1000, 500]


def test_a_kept_range_is_read_as_it_was_written(tmp_path: Path) -> None:
    with as_on_macos(), (tmp_path / "entry").open("w+b") as file:
        write_entry(file.fileno(), memoryview(CONTENT))
        assert os.fstat(file.fileno()).st_size == file_bytes(len(CONTENT))
        buffer = memoryview(bytearray(1000))
        assert read_entry(tmp_path / "entry", len(CONTENT), 300_000, buffer)
    assert bytes(buffer) == CONTENT[300_000:301_000]


@pytest.mark.parametrize("sync", [system.sync, system.sync_content])
def test_a_drive_that_keeps_data_to_itself_is_told_to_write_it(sync: object, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, as_on_macos() as commands:
        sync(file.fileno())  # type: ignore[operator]
        assert commands == [FULL_SYNC]


def test_a_file_system_that_does_not_know_the_full_sync_gets_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def refuse(descriptor: int, command: int) -> int:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    with (tmp_path / "file").open("wb") as file, as_on_macos():
        monkeypatch.setattr(fcntl, "fcntl", refuse)
        monkeypatch.setattr(os, "fsync", synced.append)
        system.sync(file.fileno())
        system.sync_content(file.fileno())
        monkeypatch.undo()
        assert synced == [file.fileno()] * 2


def test_cores_are_counted() -> None:
    assert system.count_cores() == len(os.sched_getaffinity(0))
    with as_on_macos():
        assert system.count_cores() == os.cpu_count()


@pytest.mark.parametrize("system_here", [nullcontext, as_on_macos])
def test_a_process_has_one_start_until_it_ends(system_here: type) -> None:
    with system_here():
        assert system.name_start() == system.name_start() is not None
        assert system.find_start(os.getpid()) == system.find_start(os.getpid()) is not None
        assert system.find_start(-1) is system.find_start(1 << 40) is None


def test_a_zombie_has_ended() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        here = system.find_start(process.pid)
        with as_on_macos():
            there = system.find_start(process.pid)
    assert here is there is None


def test_a_disk_whose_file_system_makes_up_numbers_is_found_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stick").mkdir()
    for folder in (tmp_path, tmp_path / "stick"):
        (folder / "file").write_bytes(CONTENT)
    mounted = [("/", "apfs"), (str(tmp_path / "stick"), "exfat")]
    parts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounted]
    with as_on_macos():
        monkeypatch.setattr(psutil, "disk_partitions", lambda *, all: parts)
        found = [pin_file(folder / "file").stamp for folder in (tmp_path, tmp_path / "stick")]
        monkeypatch.undo()
    assert ["sample:" in stamp for stamp in found] == [False, True]


@pytest.mark.parametrize("name", ["win32", "cygwin"])
@pytest.mark.parametrize("what", ["import mergemill.engine", "from mergemill import merge", "COMMAND"])
def test_windows_is_refused_with_what_would_do(name: str, what: str) -> None:
    command = "sys.argv = ['mergemill', '--version']; from mergemill.cli.main import main; main()"
    script = f"import sys; sys.platform = {name!r}; {command if what == 'COMMAND' else what}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()
    assert (
        "mergemill does not run on Windows itself, only on Linux and macOS; on Windows it runs in WSL: see " in said[-1]
    )
    if what == "COMMAND":
        assert (len(said), done.returncode, done.stdout) == (1, 2, "")
    else:
        assert said[-1].startswith("mergemill.engine.errors.UnfitSystem: ")
