"""The cache of remote ranges: what it gives back is what was fetched, and it never takes more than it may."""

import fcntl
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemill.engine.errors import InputError
from mergemill.engine.storage import cache as caching
from mergemill.engine.storage.cache import (
    RANGE_BYTES,
    CacheOptions,
    RangeCache,
    can_keep,
    default_folder,
    make_cache_folder,
    open_cache,
)
from mergemill.engine.storage.entry import CHUNK_BYTES, file_bytes
from mergemill.engine.storage.pin import Pin

MIB = 1 << 20
CONTENT = random.Random(0).randbytes(3 * MIB)
PIN = Pin("s3://models/a.safetensors", len(CONTENT), 'etag:"1"')


class Server:
    """Stands for a store: counts what it is asked for."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.asked: list[tuple[int, int]] = []

    def fetch(self, at: int, into: memoryview) -> bool:
        """Give a range."""
        self.asked.append((at, at + len(into)))
        into[:] = self.content[at : at + len(into)]
        return True


def make_cache(folder: Path, limit_bytes: int = 100 * MIB) -> RangeCache:
    return RangeCache(folder, limit_bytes, spare_bytes=0)


def read(cache: RangeCache, server: Server, start: int, stop: int, pin: Pin = PIN) -> list[tuple[int, int]]:
    """Read a range, check it, and return what the server was asked for."""
    buffer, before = bytearray(stop - start), len(server.asked)
    cache.read(pin, start, memoryview(buffer), server.fetch)
    assert buffer == server.content[start:stop]
    return server.asked[before:]


def list_entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*-*") if path.is_file()]


def measure(folder: Path) -> int:
    """Return what the files of a cache take of the disk, also those that are being written, at one moment."""
    sizes: dict[int, int] = {}  # a file may be renamed meanwhile
    with (folder / "v1" / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in (folder / "v1").glob("*/**/*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                sizes[found.st_ino] = found.st_blocks * 512 if path.is_file() else 0
    return sum(sizes.values())


# --- what is found ---


def test_a_range_is_fetched_once(tmp_path: Path) -> None:
    server = Server()
    assert read(make_cache(tmp_path), server, 10, 2 * MIB) == [(10, 2 * MIB)]
    assert read(make_cache(tmp_path), server, 10, 2 * MIB) == []


def test_only_what_is_not_there_is_fetched(tmp_path: Path) -> None:
    cache, server = make_cache(tmp_path), Server()
    read(cache, server, 100, 200)
    read(cache, server, 300, 400)
    assert read(cache, server, 50, 500) == [(50, 100), (200, 300), (400, 500)]
    assert read(cache, server, 50, 500) == []
    assert read(cache, server, 60, 499) == []


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=12),
    st.sampled_from([1, CHUNK_BYTES // 4 + 3]),
)
def test_any_cuts_give_the_same_bytes_and_fetch_each_byte_once(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int]], unit: int
) -> None:
    cache, server = make_cache(tmp_path_factory.mktemp("cache")), Server()
    for start, size in cuts:
        read(cache, server, start * unit, min((start + size) * unit, len(CONTENT)))
    fetched = [byte for start, stop in server.asked for byte in range(start // unit, stop // unit)]
    assert len(fetched) == len(set(fetched))


def test_a_range_that_crosses_shelves_is_found_from_either_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "_SHELF_BYTES", MIB)
    monkeypatch.setattr(caching, "RANGE_BYTES", MIB)
    cache, server = make_cache(tmp_path), Server()
    read(cache, server, MIB - 10, 2 * MIB - 20)
    assert read(cache, server, MIB + 5, MIB + 50) == []
    assert read(cache, server, MIB - 10, MIB) == []


def test_another_version_of_a_file_is_another_file(tmp_path: Path) -> None:
    cache, server = make_cache(tmp_path), Server()
    read(cache, server, 0, 100)
    changed = Server(CONTENT[::-1])
    assert read(cache, changed, 0, 100, Pin(PIN.url, PIN.size_bytes, 'etag:"2"')) == [(0, 100)]


def test_what_may_change_unseen_is_not_kept() -> None:
    assert can_keep(PIN)
    assert not can_keep(Pin(PIN.url, 1, ""))
    assert not can_keep(Pin("http://a/b", 1, 'etag:W/"1"'))


def test_a_fetch_that_was_stopped_leaves_nothing(tmp_path: Path) -> None:
    make_cache(tmp_path).read(PIN, 0, memoryview(bytearray(100)), lambda at, into: False)
    assert list_entries(tmp_path) == []


def test_an_error_of_the_fetch_is_passed_on_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(at: int, into: memoryview) -> bool:
        raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        make_cache(tmp_path).read(PIN, 0, memoryview(bytearray(100)), fail)
    assert list_entries(tmp_path) == []


# --- damage ---


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


DAMAGE: list[Callable[[Path], object]] = [
    lambda path: flip(path, 0),
    lambda path: flip(path, -1),
    lambda path: flip(path, file_bytes(MIB) // 2),
    lambda path: os.truncate(path, 1000),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes() + b"more"),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),
]


@pytest.mark.parametrize("damage", range(len(DAMAGE)))
def test_what_is_damaged_is_dropped_and_fetched_anew(tmp_path: Path, damage: int) -> None:
    cache, server = make_cache(tmp_path), Server()
    read(cache, server, 0, MIB)
    (entry,) = list_entries(tmp_path)
    DAMAGE[damage](entry)
    assert read(cache, server, 0, MIB) == [(0, MIB)]
    assert read(cache, server, 0, MIB) == []


def test_of_a_range_that_is_read_in_part_only_that_must_be_sound(tmp_path: Path) -> None:
    cache, server = make_cache(tmp_path), Server()
    read(cache, server, 0, MIB)
    (entry,) = list_entries(tmp_path)
    flip(entry, -1)
    assert read(cache, server, 5, 10) == []
    assert read(cache, server, MIB - 10, MIB - 5) == [(MIB - 10, MIB - 5)]


def test_an_entry_that_cannot_be_read_is_fetched(tmp_path: Path) -> None:
    cache, server = make_cache(tmp_path), Server()
    read(cache, server, 0, MIB)
    (entry,) = list_entries(tmp_path)
    entry.unlink()
    entry.mkdir()
    assert read(cache, server, 0, MIB) == [(0, MIB)]


# --- the limit ---


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache, server = make_cache(tmp_path, 10 * 68 * 1024), Server()  # ten ranges of 64 KiB, with their checksums
    for i in range(10):
        read(cache, server, i << 16, (i + 1) << 16)
    for entry in list_entries(tmp_path):
        start = int(entry.name.partition("-")[0])
        os.utime(entry, (time.time() - 1000 + (start >> 16),) * 2)
    assert read(cache, server, 0, 1 << 16) == []  # used again
    read(cache, server, 2 * MIB, 2 * MIB + (1 << 16))
    kept = {int(entry.name.partition("-")[0]) >> 16 for entry in list_entries(tmp_path)}
    assert {0, 32} <= kept
    assert 1 not in kept
    assert kept == {0, 32, *range(11 - len(kept) + 1, 10)}


def test_a_smaller_limit_shrinks_what_is_there(tmp_path: Path) -> None:
    server = Server()
    for i in range(10):
        read(make_cache(tmp_path), server, i << 16, (i + 1) << 16)
    assert measure(tmp_path) > 300_000
    assert open_cache(CacheOptions(300_000, str(tmp_path)))
    assert 0 < measure(tmp_path) <= 300_000


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache, server = make_cache(tmp_path, 100_000), Server()
    assert read(cache, server, 0, MIB) == [(0, MIB)]
    assert measure(tmp_path) == 0


def test_what_a_killed_writer_left_counts_and_goes_in_the_end(tmp_path: Path) -> None:
    cache, server = make_cache(tmp_path, 200_000), Server()
    read(cache, server, 0, 100)
    left = tmp_path / "v1" / "new" / "left"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(bytes(150_000))
    (tmp_path / "v1" / "lock").write_bytes(b"")  # killed while it counted: the disk is asked
    read(cache, server, 1000, 81_000)
    assert left.exists()
    assert measure(tmp_path) <= 200_000
    os.utime(left, (0, 0))
    read(cache, server, 1000, 81_000)
    read(cache, server, 1000, 81_000)
    assert not left.exists()
    assert [entry.name for entry in list_entries(tmp_path)] == ["1000-81000"]


WORKER = """
import random, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from storage.test_cache import CONTENT, PIN, Server, make_cache, read
folder, seed, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cache, server, draw = make_cache(folder, limit), Server(), random.Random(seed)
for _ in range(250):
    start = draw.randrange(len(CONTENT) - 1)
    read(cache, server, start, min(len(CONTENT), start + draw.randrange(1, 200_000)))
print(sum(stop - start for start, stop in server.asked))
"""


def test_two_processes_share_a_cache_that_stays_within_its_limit(tmp_path: Path) -> None:
    """Each checks every byte that it reads; entries come and go under it all the time."""
    limit, folder = 1_500_000, tmp_path / "cache"
    program = WORKER.format(tests=str(Path(__file__).parents[1]))
    workers = [
        subprocess.Popen([sys.executable, "-c", program, str(folder), str(seed), str(limit)], stdout=subprocess.PIPE)
        for seed in (1, 2)
    ]
    most = 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, measure(folder)) if (folder / "v1" / "lock").exists() else 0
    asked = [int(worker.communicate()[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert limit / 2 < most <= limit
    assert 0 < sum(asked) < 2 * 250 * 100_000 * 0.95  # some of it was found


def test_threads_share_a_cache_that_stays_within_its_limit(tmp_path: Path) -> None:
    cache, server, failures = make_cache(tmp_path, 1_500_000), Server(), []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(60):
                start = draw.randrange(len(CONTENT) - 1)
                read(cache, server, start, min(len(CONTENT), start + draw.randrange(1, 200_000)))
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, measure(tmp_path)) if (tmp_path / "v1" / "lock").exists() else 0
    assert 700_000 < most <= 1_500_000
    assert failures == []


# --- disks ---


def test_a_disk_that_fails_means_that_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, server = make_cache(tmp_path), Server()

    def fail(descriptor: int, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching, "write_entry", fail)
    assert read(cache, server, 0, MIB) == [(0, MIB)]
    assert measure(tmp_path) == 0
    monkeypatch.undo()
    assert read(cache, server, 0, MIB) == [(0, MIB)]  # and it is not tried again for a while
    assert measure(tmp_path) == 0
    assert int((tmp_path / "v1" / "lock").read_text()) == 0
    assert read(make_cache(tmp_path), server, 0, MIB) == [(0, MIB)]
    assert read(make_cache(tmp_path), server, 0, MIB) == []


def test_a_disk_is_left_the_room_that_was_asked_for(tmp_path: Path) -> None:
    cache, server = RangeCache(tmp_path, 100 * MIB, spare_bytes=1 << 60), Server()
    assert read(cache, server, 0, MIB) == [(0, MIB)]
    assert measure(tmp_path) == 0


def test_a_folder_that_is_gone_or_cannot_be_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache, server = make_cache(tmp_path / "file" / "cache"), Server()
    cache.shrink()
    assert read(cache, server, 0, 100) == [(0, 100)]
    assert read(cache, server, 0, 100) == [(0, 100)]


def test_nobody_else_can_read_what_is_kept(tmp_path: Path) -> None:
    make_cache_folder(tmp_path / "cache")
    read(make_cache(tmp_path / "cache"), Server(), 0, 100)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o077) for path in [tmp_path / "cache" / "v1", *files]} == {"0o0"}


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/cache: no cache can be there: .*; choose another --cache-folder$"):
        make_cache_folder(tmp_path / "file" / "cache")


def test_the_folder_is_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "mergemill"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache" / "mergemill"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert default_folder() == Path("/var/cache/me/mergemill")


def test_no_cache_is_opened_where_none_is_wanted() -> None:
    assert open_cache(None) is None


def test_a_piece_of_a_fetch_can_be_kept() -> None:
    from mergemill.engine.storage.fetch import PIECE_BYTES

    assert PIECE_BYTES <= RANGE_BYTES
