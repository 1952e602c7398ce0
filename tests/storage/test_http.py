"""Files of web servers: pinned by what a server says of them, and never read as another version."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from models import write_llama
from servers import faults
from servers.origin import Origin, start_origin
from servers.proxy import start_proxy
from servers.web import Answer, Web, WebHandler, serve

from mergemill.engine.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.copied_files import COPIED_FILES
from mergemill.engine.checkpoint.needed import find_needed
from mergemill.engine.errors import CheckpointError, MergemillError, SourceChanged, StorageError
from mergemill.engine.storage import connections, fetch, http, tries
from mergemill.engine.storage.body import check_range
from mergemill.engine.storage.connections import find_proxy
from mergemill.engine.storage.ranges import Pin, check_pin, close_all, list_files, pin_file, read_into, read_whole
from mergemill.engine.storage.sample import make_sample
from mergemill.engine.storage.store import Unavailable, store_of

CONTENT = bytes(i * 7 % 251 for i in range(300_000))
DATE = "Wed, 21 Oct 2026 07:28:00 GMT"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait for nothing between attempts, keep nothing between tests, and go through no proxy of the machine."""
    monkeypatch.setattr(tries, "FIRST_WAIT_S", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_all()
    yield
    close_all()


@pytest.fixture
def origin() -> Iterator[Origin]:
    with start_origin(**{"model.safetensors": CONTENT}) as running:
        yield running


@dataclass
class Asked:
    """A request that a scripted server got."""

    method: str
    path: str
    headers: dict[str, str]


class Scripted(Web):
    """A web server whose answers a test makes."""

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.answer = answer
        self.asked: list[Asked] = []


class ScriptedHandler(WebHandler):
    server: Scripted

    def do_GET(self) -> None:
        asked = Asked(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        self.server.asked.append(asked)
        self.send(self.server.answer(asked))

    do_HEAD = do_GET


@contextlib.contextmanager
def scripted(answer: Callable[[Asked], Answer]) -> Iterator[Scripted]:
    server = Scripted(answer)
    with serve(server):
        yield server


def message_of(act: Callable[..., Any], *arguments: Any, kind: type[MergemillError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        act(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_pinned_by_its_etag_and_read_by_range(origin: Origin) -> None:
    pin = pin_file(f"{origin.url}/model.safetensors")
    assert (pin.url, pin.size_bytes) == (f"{origin.url}/model.safetensors", len(CONTENT))
    assert pin.stamp.startswith('etag:"')
    buffer = bytearray(b"\xff" * 1016)
    read_into(pin, 5_000, memoryview(buffer)[8:1008])
    assert buffer == b"\xff" * 8 + CONTENT[5_000:6_000] + b"\xff" * 8
    assert read_whole(pin) == CONTENT


def test_long_ranges_go_in_pieces_over_connections_that_are_kept(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PIECE_BYTES", 10_000)
    with start_proxy(origin.url) as proxy:
        pin = pin_file(f"{proxy.url}/model.safetensors")
        assert read_whole(pin) == CONTENT
        ranges = proxy.journal.find_ranges("/model.safetensors")
        assert sorted(ranges, key=repr) == sorted(((i, i + 10_000) for i in range(0, 300_000, 10_000)), key=repr)
        assert {each.request.headers["if-match"] for each in proxy.journal.exchanges[1:]} == {pin.stamp[5:]}


def test_a_folder_is_what_answers_to_the_usual_names(tmp_path: Path) -> None:
    write_llama(tmp_path, seed=1, layers=1, shards=3)
    with start_origin() as origin:
        origin.files |= {f"/m/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
        here, there = open_checkpoint(str(tmp_path)), open_checkpoint(f"{origin.url}/m/")
        assert there.path == f"{origin.url}/m"
        assert there.config == here.config
        assert there.files == here.files
        assert there.tensors.keys() == here.tensors.keys()
        assert {stored.file.url for stored in there.tensors.values()} == {
            f"{origin.url}/m/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
        }
        origin.files["/m/part.safetensors"] = origin.files["/m/model-00001-of-00003.safetensors"]
        assert open_checkpoint(f"{origin.url}/m/part.safetensors").tensors.keys() < here.tensors.keys()
        del origin.files["/m/model-00002-of-00003.safetensors"]
        assert message_of(open_checkpoint, f"{origin.url}/m") == (
            f"{origin.url}/m/model-00002-of-00003.safetensors: no such file (404)"
        )


def test_a_folder_is_asked_for_every_file_that_an_output_copies() -> None:
    assert {name for name in COPIED_FILES if "*" not in name} <= set(http.NAMES)


def test_modules_that_modules_json_names_are_looked_for_in_their_folders(tmp_path: Path) -> None:
    write_llama(tmp_path, seed=1, layers=1)
    with start_origin() as origin:
        origin.files |= {f"/m/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
        origin.files |= {"/m/modules.json": b'[{"path": "1_Pooling"}]', "/m/1_Pooling/config.json": b"{}"}
        assert find_needed(open_checkpoint(f"{origin.url}/m")).present == ("1_Pooling/config.json", "modules.json")


def test_a_folder_of_nothing_says_what_was_looked_for(origin: Origin) -> None:
    assert message_of(list_files, f"{origin.url}/none", "") == (
        f"{origin.url}/none: has none of the files of a model, config.json and the like"
    )
    with scripted(lambda asked: Answer(403)) as server:
        assert message_of(list_files, f"{server.url}/m", "").endswith("and the like; access denied to some")
        assert message_of(pin_file, f"{server.url}/m") == f"{server.url}/m: access denied (403)"


def test_a_file_that_cannot_be_asked_for_is_not_taken_for_absent(origin: Origin) -> None:
    origin.files["/config.json"] = b"{}"
    with start_proxy(origin.url, lambda asked: faults.refuse() if "tokenizer" in asked.path else None) as proxy:
        message = message_of(list_files, proxy.url, "")
    assert message.endswith(": cannot be reached: the server answers 503")
    assert "tokenizer" in message


def test_a_server_that_refuses_head_is_asked_for_one_byte() -> None:
    def answer(asked: Asked) -> Answer:
        return Answer(403) if asked.method == "HEAD" else Answer(200, CONTENT, {"ETag": '"a"'})

    with scripted(answer) as server:
        pin = pin_file(f"{server.url}/f")
        assert (pin.size_bytes, pin.stamp) == (len(CONTENT), 'etag:"a"')
        assert server.asked[-1].headers["range"] == "bytes=0-0"
        assert read_whole(pin) == CONTENT


@pytest.mark.parametrize(
    ("fields", "stamp", "condition"),
    [
        ({"ETag": '"a"', "Last-Modified": DATE}, 'etag:"a"', ("if-match", '"a"')),
        ({"ETag": 'W/"a"'}, 'etag:W/"a"', ("if-match", None)),
        ({"Last-Modified": DATE}, f"last-modified:{DATE}", ("if-unmodified-since", DATE)),
        ({}, make_sample(len(CONTENT), lambda start, stop: CONTENT[start:stop]), ("if-match", None)),
    ],
)
def test_every_answer_must_be_of_the_version_that_was_pinned(
    fields: dict[str, str], stamp: str, condition: tuple[str, str | None]
) -> None:
    with scripted(lambda asked: Answer(200, CONTENT, fields)) as server:
        pin = pin_file(f"{server.url}/f")
        assert pin.stamp == stamp
        assert read_whole(pin) == CONTENT
        assert server.asked[-1].headers.get(condition[0]) == condition[1]
        if fields:
            server.answer = lambda asked: Answer(200, CONTENT, {"ETag": '"b"', "Last-Modified": DATE[:-6] + "1 GMT"})
            assert "changed since the plan was made" in message_of(read_whole, pin, kind=SourceChanged)
            server.answer = lambda asked: Answer(200, CONTENT)
            assert "none now; plan again" in message_of(read_whole, pin, kind=SourceChanged)
        server.answer = lambda asked: Answer(200, CONTENT + b"x", fields)
        assert "300001 bytes now" in message_of(lambda: read_into(pin, 5, memoryview(bytearray(5))), kind=SourceChanged)


@pytest.mark.parametrize("at", [0, len(CONTENT) // 2, len(CONTENT) - 1])
def test_a_file_of_a_server_that_says_nothing_of_it_is_known_by_a_sample(at: int) -> None:
    changed = bytearray(CONTENT)
    changed[at] ^= 1
    with scripted(lambda asked: Answer(200, CONTENT)) as server:
        pin = pin_file(f"{server.url}/f")
        check_pin(pin)
        server.answer = lambda asked: Answer(200, bytes(changed))
        assert "changed since the plan was made" in message_of(check_pin, pin, kind=SourceChanged)


def test_an_etag_that_only_became_weak_is_the_same() -> None:
    with scripted(lambda asked: Answer(200, CONTENT, {"ETag": '"a"'})) as server:
        pin = pin_file(f"{server.url}/f")
        server.answer = lambda asked: Answer(200, CONTENT, {"ETag": 'W/"a"'})
        assert read_whole(pin) == CONTENT


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (Answer(404), SourceChanged, "gone now; plan again"),
        (Answer(410), SourceChanged, "gone now; plan again"),
        (Answer(412), SourceChanged, "etag:none now; plan again"),
        (Answer(416, b"", {"Content-Range": "bytes */7"}), SourceChanged, "7 bytes now; plan again"),
        (Answer(401), StorageError, "access denied (401)"),
        (Answer(403), StorageError, "access denied (403)"),
        (Answer(418), StorageError, "does not serve ranges (it answers 418)"),
        (
            Answer(200, CONTENT, {"ETag": '"a"', "Content-Encoding": "gzip"}),
            StorageError,
            "its server sends it compressed, unasked; copy the file first",
        ),
        (Answer(503), StorageError, "reading at byte 10 failed 8 times, at last with: the server answers 503"),
    ],
)
def test_an_answer_that_is_no_range_names_the_cause(answer: Answer, kind: type[MergemillError], words: str) -> None:
    with scripted(lambda asked: Answer(200, CONTENT, {"ETag": '"a"'})) as server:
        pin = pin_file(f"{server.url}/f")
        server.answer = lambda asked: answer
        message = message_of(lambda: read_into(pin, 10, memoryview(bytearray(100))), kind=kind)
        assert message.startswith(pin.url)
        assert words in message


def test_chunks_are_read_and_their_end_troubles_no_later_answer(origin: Origin) -> None:
    class Chunked(ScriptedHandler):
        def do_GET(self) -> None:
            start, stop = (int(text) for text in self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("ETag", f'"{origin.url}"')
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Content-Range", f"bytes {start}-{stop}/{len(CONTENT)}")
            self.end_headers()
            part = CONTENT[start : stop + 1]
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(part), part))

    with scripted(lambda asked: Answer(404)) as server:
        server.RequestHandlerClass = Chunked
        pin = Pin(f"{server.url}/f", len(CONTENT), f'etag:"{origin.url}"')
        for start in range(0, 1000, 100):
            buffer = bytearray(100)
            assert store_of(pin.url).read_some(pin, start, memoryview(buffer)) == 100
            assert buffer == CONTENT[start : start + 100]


def test_a_server_without_ranges_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(lambda asked: Answer(200, CONTENT, {"ETag": '"a"'})) as server:
        pin = pin_file(f"{server.url}/f")
        with start_proxy(server.url, lambda asked: faults.ignore_range()) as proxy:
            through = Pin(f"{proxy.url}/f", pin.size_bytes, pin.stamp)
            assert read_whole(through) == CONTENT
            message = message_of(lambda: read_into(through, 10, memoryview(bytearray(100))), kind=StorageError)
    assert message == f"{through.url}: its server does not serve ranges (it answers 200); copy the file first"


def test_a_storm_of_faults_changes_no_byte(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PIECE_BYTES", 10_000)
    storm = [
        faults.refuse(500),
        faults.refuse(503),
        faults.refuse(429),
        faults.start_slowly(0.05),
        faults.reset_after(3_000),
        faults.truncate_after(4_000),
        faults.lose_answer(),
        faults.change_length(-7),
    ]
    with start_proxy(origin.url, faults.at_random(1, 0.4, storm)) as proxy:
        pin = pin_file(f"{proxy.url}/model.safetensors")
        for _ in range(3):
            assert read_whole(pin) == CONTENT
        assert len(proxy.journal.count_faults()) == len(storm)


def test_another_version_behind_a_proxy_is_never_read(origin: Origin) -> None:
    pin = pin_file(f"{origin.url}/model.safetensors")
    with start_proxy(origin.url, lambda asked: faults.change_bytes()) as proxy:
        message = message_of(read_whole, Pin(f"{proxy.url}/model.safetensors", *_rest(pin)), kind=SourceChanged)
    assert "changed since the plan was made" in message


def _rest(pin: Pin) -> tuple[int, str]:
    return pin.size_bytes, pin.stamp


def test_a_server_is_waited_for_as_long_as_it_asks_within_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(tries.time, "sleep", waits.append)
    answers = [
        Answer(429, b"", {"Retry-After": "7"}),
        Answer(503, b"", {"Retry-After": "999999"}),
        Answer(503, b"", {"Retry-After": "soon"}),
        Answer(200, CONTENT, {"ETag": '"a"'}),
    ]
    with scripted(lambda asked: answers.pop(0)) as server:
        assert pin_file(f"{server.url}/f").size_bytes == len(CONTENT)
    assert [wait for wait in waits if wait] == [7.0, connections.LONGEST_WAIT_S]


def test_redirects_are_followed_and_not_for_ever(origin: Origin) -> None:
    target = f"{origin.url}/model.safetensors"
    with scripted(lambda asked: Answer(302, b"", {"Location": target})) as server:
        pin = pin_file(f"{server.url}/f")
        assert (pin.url, read_whole(pin)) == (f"{server.url}/f", CONTENT)
    with scripted(lambda asked: Answer(302, b"", {"Location": f"{asked.path}?Signature=secret"})) as server:
        assert message_of(pin_file, f"{server.url}/f") == (
            f"{server.url}/f: cannot be reached: ResponseError: too many redirects"
        )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:secret@host/m", "https://host/m: its URL holds a user or a password"),
        ("https://host/m.safetensors?sig=secret", "https://host/m.safetensors: its URL holds a query"),
        ("https://host/m#secret", "https://host/m: its URL goes on after the path; leave out what follows #"),
        ("https:///m", "https:///m: is no URL; it has no host, or spaces"),
        ("https://[x/m", "https://…: is no URL: Invalid IPv6 URL"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name: is a page of the Hub; a model there is"),
    ],
)
def test_a_url_that_must_not_stand_in_a_plan_is_refused(url: str, message: str) -> None:
    for revision in (None, "main"):
        found = message_of(open_checkpoint, url, revision)
        assert found.startswith(message)
        assert "secret" not in found


def test_a_revision_of_a_web_server_is_refused() -> None:
    assert message_of(store_of("https://h/m").resolve, "https://h/m", "main") == (
        "https://h/m@main: web servers have no revisions; only models on the Hub have"
    )


def test_a_server_that_is_not_there_is_named_at_once() -> None:
    assert "cannot be reached: NewConnectionError" in message_of(pin_file, "http://127.0.0.1:9/f")


def test_a_server_that_says_no_length_is_named() -> None:
    with scripted(lambda asked: Answer(206, b"")) as server:
        assert message_of(pin_file, f"{server.url}/f").endswith("/f: its server answers 206 and not how long it is")


def test_the_proxy_of_the_environment_is_used_but_for_what_it_leaves_out(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(asked: Asked) -> Answer:
        assert asked.path == "http://far.example/f"  # what a proxy is asked for is a whole URL
        return Answer(200, CONTENT) if asked.headers.get("proxy-authorization") else Answer(407)

    with scripted(answer) as server:
        monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:pass%20word@"))
        assert read_whole(pin_file("http://far.example/f")) == CONTENT
        assert find_proxy(origin.url) is None
        assert pin_file(f"{origin.url}/model.safetensors").size_bytes == len(CONTENT)


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x"])
def test_a_length_that_is_no_size_is_an_answer_of_something_else(length: str) -> None:
    with pytest.raises(Unavailable, match="instead of 10"):
        check_range(Pin("http://h/a", 10, ""), 0, 10, 200, {"content-length": length})
