"""Every storage that fsspec knows: pinned by what it says of a file, compared with the pin before it is read."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from models import write_llama

from mergemill.engine.checkpoint import open_checkpoint
from mergemill.engine.errors import CheckpointError, MergemillError, SourceChanged, StorageError
from mergemill.engine.storage import fetch, tries
from mergemill.engine.storage.anything import AnyStore
from mergemill.engine.storage.ranges import check_pin, close_all, list_files, pin_file, read_into, read_whole
from mergemill.engine.storage.store import store_of

CONTENT = bytes(i * 7 % 251 for i in range(10_000))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fsspec's files in memory, which all of a process shares; empty."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.0)
    close_all()
    yield fsspec.filesystem("memory")
    close_all()


def message_of(act: Callable[..., Any], *arguments: Any, kind: type[MergemillError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        act(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raise_(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    return fail


def test_a_model_opens_as_it_does_from_a_folder(memory: Any, tmp_path: Path) -> None:
    write_llama(tmp_path / "m", seed=1, layers=1, shards=3)
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "tool.jinja").write_text("x")
    (tmp_path / "m" / "other").mkdir()
    (tmp_path / "m" / "other" / "x.json").write_text("{}")
    memory.put(str(tmp_path / "m"), "/bucket/m", recursive=True)
    here, there = open_checkpoint(str(tmp_path / "m")), open_checkpoint("memory://bucket/m/")
    assert there.path == "memory://bucket/m"
    assert (there.config, there.files) == (here.config, here.files)
    assert "additional_chat_templates/tool.jinja" in there.files
    for name, stored in here.tensors.items():
        other = there.tensors[name]
        assert (other.dtype, other.shape, other.offset_bytes) == (stored.dtype, stored.shape, stored.offset_bytes)
        assert other.file.url.startswith("memory://bucket/m/model-0")
        both = bytearray(stored.nbytes), bytearray(stored.nbytes)
        read_into(stored.file, stored.offset_bytes, memoryview(both[0]))
        read_into(other.file, other.offset_bytes, memoryview(both[1]))
        assert both[0] == both[1]
    memory.copy("/bucket/m/model-00001-of-00003.safetensors", "/bucket/m/part.safetensors")
    assert open_checkpoint("memory://bucket/m/part.safetensors").tensors.keys() < here.tensors.keys()


def test_a_file_is_the_same_listed_or_asked_for(memory: Any) -> None:
    memory.pipe("/m/a", CONTENT)
    found = list_files("memory://m", "x")
    assert found == {"a": pin_file("memory://m/a")}
    assert found["a"].size_bytes == len(CONTENT)
    assert found["a"].stamp.startswith("created:")
    assert list_files("memory://m/a", "x") is None


def test_a_read_fills_the_buffer_with_its_range(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/m/a", CONTENT)
    pin = pin_file("memory://m/a")
    buffer = bytearray(b"\xff" * 116)
    read_into(pin, 77, memoryview(buffer)[8:108])
    assert buffer == b"\xff" * 8 + CONTENT[77:177] + b"\xff" * 8
    monkeypatch.setattr(fetch, "PIECE_BYTES", 999)
    assert read_whole(pin) == CONTENT


def test_a_file_that_changed_is_found_when_it_is_checked(memory: Any) -> None:
    memory.pipe("/m/a", CONTENT)
    pin = pin_file("memory://m/a")
    check_pin(pin)
    memory.pipe("/m/a", CONTENT)
    assert message_of(check_pin, pin, kind=SourceChanged).startswith("memory://m/a: changed since the plan was made")
    memory.pipe("/m/a", CONTENT[:50])
    message = message_of(lambda: read_into(pin, 40, memoryview(bytearray(20))), kind=SourceChanged)
    assert message.endswith("not longer than 50 bytes now; plan again")
    memory.rm("/m/a")
    for use in (check_pin, lambda pin: read_into(pin, 0, memoryview(bytearray(4)))):
        assert message_of(use, pin, kind=SourceChanged).endswith("gone now; plan again")


@pytest.mark.parametrize("said", ["created", "nothing"])
def test_a_file_of_the_same_size_and_time_is_found_by_a_sample(
    said: str, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a server that tells whole seconds, or of a driver that tells no time at all."""
    kept = {"created": 7} if said == "created" else {}
    monkeypatch.setattr(
        MemoryFileSystem,
        "info",
        lambda self, path: {"name": path, "size": self.size(path), "type": "file", **kept},
    )
    monkeypatch.setattr(MemoryFileSystem, "size", lambda self, path: len(self.cat_file(path)))
    content = CONTENT * 40
    memory.pipe("/m/a", content)
    pin = pin_file("memory://m/a")
    check_pin(pin)
    for at in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        memory.pipe("/m/a", bytes(changed))
        assert "changed since the plan was made" in message_of(check_pin, pin, kind=SourceChanged)
    memory.pipe("/m/a", content)
    check_pin(pin)


def test_what_is_not_there_is_named(memory: Any) -> None:
    assert message_of(pin_file, "memory://m/a") == "memory://m/a: no such file or folder"
    assert message_of(list_files, "memory://m", "x") == "memory://m: no such file or folder"


def test_what_a_driver_raises_is_told_without_signatures(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/m/a", CONTENT)
    pin = pin_file("memory://m/a")
    monkeypatch.setattr(MemoryFileSystem, "info", raise_(RuntimeError("500 at https://h/a?sig=secret\nmore")))
    assert message_of(pin_file, pin.url) == f"{pin.url}: cannot be read: RuntimeError: 500 at https://h/a"
    monkeypatch.setattr(MemoryFileSystem, "info", raise_(PermissionError("no")))
    assert message_of(pin_file, pin.url) == f"{pin.url}: access denied; check the credentials for it"
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *_: {"name": "/m/a", "size": None})
    assert message_of(pin_file, pin.url).endswith("its server does not say how long it is; copy the file first")


def test_a_read_is_tried_again_and_its_last_failure_named(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/m/a", CONTENT)
    pin = pin_file("memory://m/a")
    whole = MemoryFileSystem.cat_file
    failures = [RuntimeError("soon")] * 3

    def flaky(self: Any, path: str, **span: int) -> bytes:
        if failures:
            raise failures.pop()
        found: bytes = whole(self, path, **span)
        return found[: max(1, len(found) // 2)]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    buffer = bytearray(1_000)
    read_into(pin, 0, memoryview(buffer))
    assert buffer == CONTENT[:1_000]
    monkeypatch.setattr(MemoryFileSystem, "cat_file", raise_(RuntimeError("never")))
    assert message_of(lambda: read_into(pin, 9, memoryview(buffer)), kind=StorageError) == (
        f"{pin.url}: reading at byte 9 failed 8 times, at last with: RuntimeError: never"
    )
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **more: CONTENT)
    assert message_of(lambda: read_into(pin, 9, memoryview(buffer)), kind=StorageError) == (
        f"{pin.url}: its server does not serve ranges; copy the file first"
    )


@pytest.mark.parametrize(
    ("url", "revision", "message"),
    [
        ("memory://m", "main", "memory://m@main: only models on the Hub have revisions"),
        ("sftp://me:secret@host/m", None, "sftp://host/m: its URL holds a user or a password, which would be written"),
        ("memory://m/a?sig=secret", None, "memory://m/a: its URL holds a query, which would be written"),
    ],
)
def test_a_url_that_must_not_stand_in_a_plan_is_refused(url: str, revision: str | None, message: str) -> None:
    assert message_of(open_checkpoint, url, revision).startswith(message)


def test_a_storage_whose_package_is_missing_names_it() -> None:
    missing = next((name for name in ("gs", "oci", "box", "wandb") if not _has_package(name)), None)
    if missing is None:
        pytest.skip("every package that this test knows is installed")
    assert message_of(store_of, f"{missing}://m").startswith(f"{missing}://: needs a package that is not installed: ")


def _has_package(scheme: str) -> bool:
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        return False
    return True


@pytest.mark.parametrize("shared", [True, False])
def test_threads_share_the_file_system_of_a_server_where_its_driver_lets_them(shared: bool) -> None:
    """As that of S3 does; but two threads on one connection of SFTP would wait for ever."""
    kind = type("Kind", (MemoryFileSystem,), {"protocol": "kind", "async_impl": shared, "mirror_sync_methods": False})
    fsspec.register_implementation("kind", kind, clobber=True)
    store, meet = AnyStore({}), threading.Barrier(4)

    def find(url: str) -> tuple[Any, Any]:
        meet.wait(10)
        return store.find_system(url), store.find_system(f"{url}/more")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(find, ["kind://m/a", "kind://m/b"] * 2))
    assert all(first is second for first, second in found)
    assert len({id(first) for first, _ in found}) == (1 if shared else 4)
