"""Outputs in any storage that fsspec writes: a task streams a whole shard, and the bytes are those of a folder.

Three kinds are tried: a store with folders, which renames (``local://``, fsspec's own way to this disk), an object
store (s3fs on moto, under another name than ``s3://``, which has a way of its own), and ``memory://``.
"""

import hashlib
import itertools
import secrets
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from runs.merging import Killed, hash_output, parts_of, plan_merge
from servers.fixtures import BUCKET
from servers.s3 import S3

from mergemill.engine import abort, inspect, run, verify
from mergemill.engine.errors import CheckpointError, OutputError, PlanError, RunError, StorageError, VerifyError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed, Event, PartFinished, Started
from mergemill.engine.runs.outputs import lease, whole
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.storage import streams
from mergemill.engine.storage.ranges import close_all
from mergemill.engine.storage.store import ENVIRONMENT
from mergemill.engine.storage.streams import BESIDE_BYTES, BLOCK_BYTES, open_stream

INDEX = "model.safetensors.index.json"
STATE = ".mergemill/"
KINDS = ("local", "elsewhere", "memory")
PART = 1 << 20
_NUMBERS = (secrets.token_hex(4) for _ in itertools.count())  # this module may be there twice, and memory once


class Place:
    """A folder or prefix that nobody has used, looked at through fsspec."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: Any = fsspec.url_to_fs(url)[0]
        self._root = self.files._strip_protocol(url)

    def read(self) -> dict[str, bytes]:
        """Return the content of all files, by name."""
        return {name: self.files.cat_file(f"{self.url}/{name}") for name in self.sizes()}

    def sizes(self) -> dict[str, int]:
        """Return the sizes of all files, by name."""
        self.files.invalidate_cache()
        with suppress(FileNotFoundError):
            found = self.files.find(self.url, detail=True)
            return {name.removeprefix(f"{self._root}/"): each["size"] for name, each in found.items()}
        return {}

    def shards(self) -> list[str]:
        """Return the names of finished shards."""
        return sorted(name for name in self.sizes() if name.endswith(".safetensors"))

    def unfinished(self) -> list[str]:
        """Return the names of shards that have no name of their own yet."""
        return sorted(name for name in self.sizes() if ".tmp-" in name)

    def hash(self) -> dict[str, str]:
        """Return the sha256 of every file but mergemill's own, by name."""
        files = self.read().items()
        return {name: hashlib.sha256(data).hexdigest() for name, data in files if not name.startswith(STATE)}

    def put(self, name: str, data: bytes) -> None:
        """Write a file."""
        if self.url.startswith("local"):
            self.files.makedirs(self.files._parent(f"{self.url}/{name}"), exist_ok=True)
        self.files.pipe_file(f"{self.url}/{name}", data)

    def delete(self, name: str) -> None:
        """Remove a file."""
        self.files.rm_file(f"{self.url}/{name}")


@pytest.fixture
def elsewhere(moto_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """moto, known to fsspec as ``elsewhere://``."""
    s3fs = pytest.importorskip("s3fs")
    kind = type("Elsewhere", (s3fs.S3FileSystem,), {"protocol": ("elsewhere",)})
    fsspec.register_implementation("elsewhere", kind, clobber=True)
    for name, value in moto_server.make_environ().items():
        monkeypatch.setenv(name, value)
    yield moto_server
    close_all()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A new place of each kind."""
    if request.param == "elsewhere":
        request.getfixturevalue("elsewhere")
    return make_place(request.param, tmp_path)


@pytest.fixture(params=["local", "memory"])
def near(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A new place of both kinds that take no time."""
    return make_place(request.param, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    """A new place in a store that renames."""
    return make_place("local", tmp_path)


def make_place(kind: str, tmp_path: Path) -> Place:
    number = next(_NUMBERS)
    urls = {
        "local": f"local://{tmp_path}/deep/out-{number}",
        "elsewhere": f"elsewhere://{BUCKET}/whole/out-{number}",
        "memory": f"memory://whole/out-{number}",
    }
    return Place(urls[kind])


def plan_shards(family: Path, method: str = "linear", *, shard_size: str = "1MB") -> Plan:
    return plan_merge(method, family, part_bytes=PART, shard_size=shard_size)


def run_here(plan: Plan, url: str, **options: Any) -> Committed:
    return run(plan, url, **{"workers": 0, "threads": 2} | options)


def run_until(plan: Plan, url: str, shards: int) -> None:
    """Run `plan` on one thread and end as if killed once so many shards have receipts."""
    done: set[str] = set()

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished):
            done.add(event.receipt.shard)
            of_shard = [part for part in plan.parts if plan.shards[part.shard].name == event.receipt.shard]
            if len(done) == shards and event.receipt.part == of_shard[-1].number:
                raise Killed

    with pytest.raises(Killed):
        run_here(plan, url, threads=1, on_event=stop)


# --- the same bytes ---


@pytest.mark.parametrize(
    ("method", "shard_size"), [("linear", "1MB"), ("ties", "1MB"), ("ties", "tensor"), ("linear", "5GB")]
)
def test_the_bytes_are_those_of_a_folder(
    place: Place, family: Path, tmp_path: Path, method: str, shard_size: str
) -> None:
    plan = plan_shards(family, method, shard_size=shard_size)
    run_here(plan, str(tmp_path / "expected"))
    assert len(plan.shards) > 1 or shard_size == "5GB"
    committed = run_here(plan, place.url)
    assert committed.redone_parts == len(plan.parts)
    assert place.hash() == hash_output(tmp_path / "expected")
    assert place.unfinished() == []


def test_a_finished_merge_is_verified_inspected_and_not_done_again(place: Place, family: Path) -> None:
    plan = plan_shards(family, "ties")
    run_here(plan, place.url)
    with parts_of(PART):
        assert verify(place.url, replay=3).replayed == 3
    found = inspect(place.url)
    assert (found.kind, found.state, found.shards) == ("merge", "finished", len(plan.shards))
    assert run_here(plan, place.url).redone_parts == 0
    name = plan.shards[1].name
    data = place.files.cat_file(f"{place.url}/{name}")
    place.put(name, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(VerifyError, match="changed since they were written"):
        verify(place.url)
    place.delete(name)
    with pytest.raises(RunError, match=f"was finished, but {name} is gone"):
        run_here(plan, place.url)


def test_worker_processes_write_to_a_store_that_they_see(folder: Place, family: Path, tmp_path: Path) -> None:
    plan = plan_shards(family, "ties")
    run_here(plan, str(tmp_path / "expected"))
    run(plan, folder.url, workers=2)
    assert folder.hash() == hash_output(tmp_path / "expected")


# --- nothing half-made ---


def test_until_the_commit_there_is_nothing_that_a_loader_takes_for_a_model(near: Place, family: Path) -> None:
    plan = plan_shards(family)
    renames = near.url.startswith("local")
    seen: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, PartFinished):
            seen.append(len(near.shards()))
            assert not {INDEX, "model.safetensors", "config.json"} & near.sizes().keys()
            assert not renames or near.shards() == []

    run_here(plan, near.url, on_event=look)
    assert len(seen) == len(plan.parts)
    assert renames or max(seen) == len(plan.shards)


# --- resuming ---


def test_a_killed_merge_keeps_whole_shards(place: Place, family: Path, tmp_path: Path) -> None:
    plan = plan_shards(family, "ties")
    run_here(plan, str(tmp_path / "expected"))
    run_until(plan, place.url, 2)
    assert inspect(place.url).state.startswith("unfinished: ")
    begun: list[Event] = []
    committed = run_here(plan, place.url, on_event=begun.append)
    kept = len(plan.parts) - committed.redone_parts
    assert 0 < kept < len(plan.parts)
    assert [event.resumed_parts for event in begun if isinstance(event, Started)] == [kept]
    assert place.hash() == hash_output(tmp_path / "expected")
    assert place.unfinished() == []


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_shard_that_is_not_whole_is_merged_again(near: Place, family: Path, tmp_path: Path, damage: str) -> None:
    plan = plan_shards(family)
    run_here(plan, str(tmp_path / "expected"))
    run_until(plan, near.url, 2)
    name = (near.unfinished() or near.shards())[0]
    data = near.files.cat_file(f"{near.url}/{name}")
    near.delete(name)
    if damage == "shorter":
        near.put(name, data[:-1])
    begun: list[Event] = []
    run_here(plan, near.url, on_event=begun.append)
    kept = {event.receipt.shard for event in begun if isinstance(event, PartFinished) and event.kept}
    assert len(kept) == 1
    assert kept.pop() not in name
    assert near.hash() == hash_output(tmp_path / "expected")


def test_a_shard_that_goes_before_the_commit_is_told_of(folder: Place, family: Path) -> None:
    plan = plan_shards(family)

    def remove(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == len(plan.parts):
            folder.delete(folder.unfinished()[0])

    with pytest.raises(RunError, match=r"-of-.*: is gone or not whole; run the same merge again to resume"):
        run_here(plan, folder.url, on_event=remove)
    assert INDEX not in folder.sizes()
    run_here(plan, folder.url)
    assert verify(folder.url).shards == len(plan.shards)


def test_what_an_attempt_left_is_removed(folder: Place, family: Path) -> None:
    plan = plan_shards(family)
    run_until(plan, folder.url, 1)
    folder.put(f"{STATE}{plan.shards[2].name}.tmp-0123", b"half")
    folder.put(f"{STATE}object.tmp-4567", b"half")
    run_here(plan, folder.url)
    assert folder.unfinished() == []


# --- what is not ours ---


def test_a_place_that_holds_something_else_is_refused(near: Place, family: Path) -> None:
    near.put("notes.txt", b"mine")
    near.put("other.txt", b"mine")
    with pytest.raises(OutputError, match=r"holds 'notes.txt' and 1 more; the output must be .* new or empty"):
        run_here(plan_shards(family), near.url)
    assert near.read() == {"notes.txt": b"mine", "other.txt": b"mine"}


def test_another_merge_is_refused(near: Place, family: Path) -> None:
    run_until(plan_shards(family), near.url, 1)
    before = near.read()
    with pytest.raises(OutputError, match="holds another merge, which differs in the recipe"):
        run_here(plan_shards(family, "ties"), near.url)
    assert near.read() == before


@pytest.mark.parametrize("shard", [True, False])
def test_a_file_that_appears_is_not_overwritten(near: Place, family: Path, shard: bool) -> None:
    plan = plan_shards(family)
    name = plan.shards[-1].name if shard else "config.json"
    run_until(plan, near.url, 1)
    near.put(name, b"somebody's")
    with pytest.raises(OutputError, match=rf"{name}: appeared while the merge ran; move it away"):
        run_here(plan, near.url)
    assert near.files.cat_file(f"{near.url}/{name}") == b"somebody's"
    assert INDEX not in near.sizes()
    near.delete(name)
    run_here(plan, near.url)
    assert verify(near.url).shards == len(plan.shards)


def test_a_second_driver_is_refused(near: Place, family: Path) -> None:
    plan = plan_shards(family)
    errors: list[str] = []

    def try_too(event: Event) -> None:
        if isinstance(event, Started):
            with pytest.raises(OutputError) as caught:
                run_here(plan, near.url)
            errors.append(str(caught.value))

    run_here(plan, near.url, on_event=try_too)
    assert "another mergemill is writing here" in errors[0]
    assert f"{STATE}lock" not in near.sizes()


def test_the_lease_of_a_driver_that_is_gone_is_taken(
    near: Place, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_shards(family)
    near.put(f"{STATE}lock", b'{"host": "elsewhere", "pid": 1}')
    with pytest.raises(OutputError, match=r"process 1 of elsewhere, seen \d+ s ago"):
        run_here(plan, near.url)
    monkeypatch.setattr(lease, "OLD_S", -5.0)
    run_here(plan, near.url)
    assert not [name for name in near.sizes() if "lock" in name]


def test_a_lease_whose_age_cannot_be_had_is_nobodys_to_take(
    near: Place, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, system = plan_shards(family), type(streams.locate(near.url, ENVIRONMENT)[0])
    near.put(f"{STATE}lock", b'{"host": "elsewhere", "pid": 1}')
    for error, said in [(ConnectionResetError("once"), "once"), (NotImplementedError(), "storage does not tell when")]:

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(system, "modified", fail)
            with pytest.raises((OutputError, StorageError), match=said):
                run_here(plan, near.url)
    assert near.sizes() == {f"{STATE}lock": 31}


# --- giving up ---


def test_abort_removes_what_is_ours(place: Place, family: Path) -> None:
    plan = plan_shards(family)
    run_until(plan, place.url, 2)
    written = sum(size for name, size in place.sizes().items() if "safetensors" in name)
    assert abort(place.url) == written > 0
    assert place.sizes() == {}
    assert not place.url.startswith("local") or not Path(place.url.removeprefix("local://")).exists()
    with pytest.raises(OutputError, match="holds no unfinished merge; there is nothing to abort"):
        abort(place.url)


def test_abort_leaves_what_is_not_ours_and_what_is_finished(near: Place, family: Path) -> None:
    plan = plan_shards(family)
    run_until(plan, near.url, 1)
    near.put(plan.shards[-1].name, b"somebody's")
    near.put("notes.txt", b"mine")
    abort(near.url)
    assert near.read() == {plan.shards[-1].name: b"somebody's", "notes.txt": b"mine"}
    near.delete(plan.shards[-1].name)
    near.delete("notes.txt")
    run_here(plan, near.url)
    before = near.read()
    with pytest.raises(OutputError, match="is a finished merge"):
        abort(near.url)
    assert near.read() == before


# --- where nothing can be written ---


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/out", "http://host/out: can be read and not written; the output is a folder, s3://"),
        ("simplecache::memory://out", "simplecache::…: a URL inside of another is not followed"),
        ("no-such://out", "no-such://out: no-such:// is no kind of storage; the output is a folder"),
        ("sftp://user:secret@host/out", "sftp://host/out: its URL holds a user or a password"),
        ("memory://out?key=secret", "memory://out: its URL holds a query"),
        ("webdav://host/out", "webdav://host/out: needs a package that is not installed: "),
    ],
)
def test_what_cannot_be_written_is_one_clear_error(family: Path, url: str, message: str) -> None:
    with pytest.raises(OutputError) as caught:
        run_here(plan_shards(family), url)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_storage_that_turns_out_to_be_read_only_is_one_clear_error(family: Path) -> None:
    class Shown(MemoryFileSystem):
        protocol = "shown"
        store: dict[str, Any] = {}  # noqa: RUF012 - as its parent has it
        pseudo_dirs = [""]  # noqa: RUF012

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            if mode != "rb":
                raise NotImplementedError
            return super()._open(path, mode, **options)

    fsspec.register_implementation("shown", Shown, clobber=True)
    with pytest.raises(OutputError, match="shown:// cannot be written to; the output is a folder, s3://"):
        run_here(plan_shards(family), "shown://out")
    assert Shown.store == {}


@pytest.mark.parametrize("workers", [{"workers": 1}, {"scheduler": "tcp://127.0.0.1:1"}])
def test_the_memory_of_this_process_is_for_its_threads_alone(family: Path, workers: dict[str, Any]) -> None:
    with pytest.raises(OutputError, match=r"memory://out: is in the memory of this process, .*; use --workers 0"):
        run(plan_shards(family), "memory://out", **workers)


def test_a_missing_bucket_is_one_clear_error(elsewhere: S3, family: Path) -> None:
    with pytest.raises(OutputError, match=r"elsewhere://no-such-bucket/out.*: no such bucket or folder"):
        run_here(plan_shards(family), "elsewhere://no-such-bucket/out")


def test_no_model_is_not_inspected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        inspect(f"local://{tmp_path}/nothing")


# --- streaming ---


class Failing(MemoryFileSystem):
    """Memory that is full after some bytes of shards."""

    protocol = "failing"
    left_bytes = 0

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        return file if mode == "rb" or "safetensors" not in path or path.endswith(".json") else Full(file)


class Full:
    """A file that takes no more once the memory is full."""

    def __init__(self, file: MemoryFile) -> None:
        self._file = file

    def write(self, data: memoryview) -> int:
        Failing.left_bytes -= len(data)
        if Failing.left_bytes < 0:
            raise OSError("quota exceeded")
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def test_a_write_that_fails_ends_the_merge_which_resumes(family: Path, tmp_path: Path) -> None:
    fsspec.register_implementation("failing", Failing, clobber=True)
    plan = plan_shards(family)
    run_here(plan, str(tmp_path / "expected"))
    place = Place(f"failing://out-{next(_NUMBERS)}")
    Failing.left_bytes = plan.shards[0].size_bytes + 100_000
    with pytest.raises(StorageError, match="cannot be written: OSError: quota exceeded"):
        run_here(plan, place.url, threads=1)
    assert inspect(place.url).state.startswith("unfinished")
    Failing.left_bytes = 1 << 40
    assert 0 < run_here(plan, place.url).redone_parts < len(plan.parts)
    assert place.hash() == hash_output(tmp_path / "expected")
    Failing.left_bytes = 100_000
    other = Place(f"failing://out-{next(_NUMBERS)}")
    with pytest.raises(StorageError):
        run_here(plan, other.url, threads=1)
    assert other.shards(), "a shard that can be seen before it is whole"
    abort(other.url)
    assert other.sizes() == {}


def test_a_file_that_is_given_up_never_appears(elsewhere: S3, tmp_path: Path) -> None:
    place = make_place("elsewhere", tmp_path)
    for size_bytes in (1000, 2 * BLOCK_BYTES + 1000):
        with pytest.raises(Killed):
            _begin(f"{place.url}/shard", size_bytes)
        assert place.sizes() == {}
    assert "Uploads" not in elsewhere.connect().list_multipart_uploads(Bucket=BUCKET, Prefix=place.url.split("/", 3)[3])


def _begin(url: str, size_bytes: int) -> None:
    with open_stream(url, ENVIRONMENT) as stream:
        stream.write(memoryview(bytes(size_bytes)))
        raise Killed


def test_a_driver_holds_no_more_than_is_counted(elsewhere: S3, tmp_path: Path) -> None:
    place = make_place("elsewhere", tmp_path)
    slab = memoryview(bytes(3 << 20))
    with open_stream(f"{place.url}/first", ENVIRONMENT) as stream:  # what is imported at the first use
        stream.write(slab)
        stream.finish()
    tracemalloc.start()
    try:
        with open_stream(f"{place.url}/shard", ENVIRONMENT) as stream:
            for _ in range(32):
                stream.write(slab)
            stream.finish()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert place.sizes()["shard"] == 96 << 20
    assert BLOCK_BYTES < peak_bytes <= BESIDE_BYTES


def test_a_shard_too_large_for_object_stores_is_refused(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MOST_BYTES", 1_000_000)
    with pytest.raises(OutputError, match=r"bytes; 1000000 are the most .*; choose a smaller --shard-size"):
        run_here(plan_shards(family, shard_size="5GB"), "memory://large")


def test_what_a_driver_holds_counts_as_memory_of_the_worker(near: Place, family: Path) -> None:
    assert find_output(near.url).beside_bytes == BESIDE_BYTES
    with pytest.raises(PlanError, match=r"--memory 32.0 MiB is too little: tensor .* needs \d+ bytes"):
        run_here(plan_shards(family), near.url, memory=BESIDE_BYTES)
    run_here(plan_shards(family), near.url, memory=2 * (BESIDE_BYTES + (96 << 20)))
    assert verify(near.url)
