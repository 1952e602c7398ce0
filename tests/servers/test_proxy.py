"""The proxy of the tests: it changes nothing unasked, and every fault looks to a plain client as it is named."""

import contextlib
import http.client
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from servers import faults
from servers.asked import parse_range
from servers.faults import Fault
from servers.fixtures import BUCKET
from servers.origin import start_origin
from servers.processes import find_free_ports
from servers.proxy import Proxy, start_proxy, start_proxy_process
from servers.s3 import S3

KEY = "/file"
CONTENT = bytes(i * 7 % 251 for i in range(300_000))
PART = 5 << 20


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy without faults in front of a plain server that has CONTENT at KEY."""
    with start_origin(file=CONTENT) as origin, start_proxy(origin.url) as running:
        yield running


@contextlib.contextmanager
def talk(proxy: Proxy) -> Iterator[http.client.HTTPConnection]:
    parts = urlsplit(proxy.url)
    assert parts.hostname
    with contextlib.closing(http.client.HTTPConnection(parts.hostname, parts.port)) as connection:
        yield connection


def ask(proxy: Proxy, method: str, target: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Return status and body of one request on a connection of its own."""
    with talk(proxy) as connection:
        connection.request(method, target, body, headers)
        with connection.getresponse() as answer:
            return answer.status, answer.read()


def fail_next(proxy: Proxy, fault: Fault) -> None:
    """Have the next request meet this fault, and none after it."""
    number = len(proxy.journal.exchanges)
    proxy.rule = faults.at_numbers({number: fault})


@pytest.mark.parametrize(
    ("text", "span"), [("bytes=5-7", (5, 8)), ("bytes=5-", (5, None)), ("bytes=-5", (-5, None)), ("bytes=-", None)]
)
def test_a_range_is_read_as_a_slice(text: str, span: tuple[int, int | None] | None) -> None:
    assert parse_range(text) == span


def test_what_is_signed_for_the_proxy_holds_at_the_server(s3_server: S3) -> None:
    body = bytes(PART) + b"end"
    with start_proxy(s3_server.url) as proxy, contextlib.closing(s3_server.through(proxy.url).connect()) as client:
        where = {"Bucket": BUCKET, "Key": "proxy/sign ed+parts"}
        upload = where | {"UploadId": client.create_multipart_upload(**where)["UploadId"]}
        sent = [client.upload_part(**upload, PartNumber=n, Body=part) for n, part in ((1, body[:PART]), (2, b"end"))]
        parts = [{"PartNumber": n, "ETag": answer["ETag"]} for n, answer in enumerate(sent, 1)]
        assert len(client.list_parts(**upload)["Parts"]) == 2
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        assert client.get_object(**where)["Body"].read() == body
        assert client.get_object(**where, Range=f"bytes={PART}-")["Body"].read() == b"end"
        client.copy_object(Bucket=BUCKET, Key="proxy/copy", CopySource=where)
        assert client.head_object(Bucket=BUCKET, Key="proxy/copy")["ContentLength"] == len(body)
        counts = {"create": 1, "part": 2, "list_parts": 1, "complete": 1, "get": 2, "copy": 1, "head": 1}
        assert proxy.journal.count() == counts
        assert proxy.journal.find_ranges(f"/{BUCKET}/proxy/sign ed+parts")[1:] == [None, (PART, None)]
        assert proxy.journal.received_bytes >= len(body)
        assert [each.request.headers.get("expect") for each in proxy.journal.exchanges[1:3]] == ["100-continue"] * 2


def test_a_stream_of_unknown_length_passes(s3_server: S3) -> None:
    def make_pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100_000

    with start_proxy(s3_server.url) as proxy, contextlib.closing(s3_server.connect()) as direct:
        signed = s3_server.through(proxy.url).connect()
        target = signed.generate_presigned_url("put_object", Params={"Bucket": BUCKET, "Key": "proxy/stream"})
        signed.close()
        with talk(proxy) as connection:
            connection.request("PUT", target.removeprefix(proxy.url), make_pieces(), encode_chunked=True)
            with connection.getresponse() as answer:
                assert answer.status == 200, answer.read()
        assert direct.head_object(Bucket=BUCKET, Key="proxy/stream")["ContentLength"] == 2_000_000


def test_one_connection_carries_many_requests(proxy: Proxy) -> None:
    with talk(proxy) as connection:
        for start in range(0, 100_000, 10_000):
            connection.request("GET", KEY, headers={"Range": f"bytes={start}-{start + 9_999}"})
            with connection.getresponse() as answer:
                assert answer.read() == CONTENT[start : start + 10_000]
            connection.request("HEAD", KEY)
            with connection.getresponse() as answer:
                assert answer.getheader("Content-Length") == str(len(CONTENT))
    spans = [(start, start + 10_000) for start in range(0, 100_000, 10_000)]
    assert proxy.journal.find_ranges(KEY) == spans
    assert proxy.journal.sent_bytes == 100_000


def test_a_storm_is_answered_by_the_proxy_and_the_connection_goes_on(proxy: Proxy) -> None:
    proxy.rule = faults.at_first(2, faults.refuse(503, "SlowDown"))
    with talk(proxy) as connection:
        for status in (503, 503, 200):
            connection.request("PUT", "/storm", b"body")
            with connection.getresponse() as answer:
                assert answer.status == status
                assert (b"<Code>SlowDown</Code>" in answer.read()) == (status == 503)
    assert proxy.journal.count_faults() == {"refuse 503": 2}
    assert proxy.journal.received_bytes == 3 * len(b"body")


def test_boto3_takes_the_storm_for_one_of_s3(s3_server: S3) -> None:
    with start_proxy(s3_server.url, faults.at_first(2, faults.refuse(), "put")) as stormy:
        through = s3_server.through(stormy.url)
        with contextlib.closing(through.connect(retries={"mode": "standard", "total_max_attempts": 3})) as client:
            client.put_object(Bucket=BUCKET, Key="proxy/retried", Body=b"body")
        assert stormy.journal.count() == {"put": 3}
        with (
            contextlib.closing(through.connect(retries={"total_max_attempts": 1})) as client,
            pytest.raises(Exception, match="SlowDown"),
        ):
            client.put_object(Bucket=BUCKET, Key="proxy/once", Body=b"body")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (faults.reset_after(70_000), ConnectionResetError),
        (faults.truncate_after(70_000), http.client.IncompleteRead),
        (faults.lose_answer(), ConnectionResetError),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_answer_breaks_off(proxy: Proxy, fault: Fault, error: type[Exception]) -> None:
    fail_next(proxy, fault)
    with pytest.raises(error):
        ask(proxy, "GET", KEY)
    assert proxy.journal.exchanges[-1].sent_bytes == (fault.cut_after_bytes or 0)
    assert ask(proxy, "GET", KEY) == (200, CONTENT)


def test_a_lost_answer_is_of_something_done(proxy: Proxy) -> None:
    fail_next(proxy, faults.lose_answer())
    with pytest.raises(ConnectionResetError):
        ask(proxy, "PUT", "/done", b"done")
    assert ask(proxy, "GET", "/done") == (200, b"done")


def test_an_upload_breaks_off(proxy: Proxy) -> None:
    fail_next(proxy, faults.reset_upload_after(1000))
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        ask(proxy, "PUT", "/half", CONTENT * 10)
    assert proxy.journal.exchanges[-1].received_bytes == 1000
    assert ask(proxy, "GET", "/half")[0] == 404


@pytest.mark.parametrize("by_bytes", [-1, 1, -10_000])
def test_a_body_of_another_length_fits_its_header(proxy: Proxy, by_bytes: int) -> None:
    fail_next(proxy, faults.change_length(by_bytes))
    with talk(proxy) as connection:
        for expected in ((CONTENT + b"\0")[500 : 10_500 + by_bytes], CONTENT[500:10_500]):
            connection.request("GET", KEY, headers={"Range": "bytes=500-10499"})
            with connection.getresponse() as answer:
                assert answer.getheader("Content-Length") == str(len(expected))
                assert answer.read()[:10_000] == expected[:10_000]


def test_another_version_has_another_etag_each_time_the_same(proxy: Proxy) -> None:
    with talk(proxy) as connection:

        def get() -> tuple[str | None, bytes]:
            connection.request("GET", KEY)
            with connection.getresponse() as answer:
                return answer.getheader("ETag"), answer.read()

        etag, _ = get()
        fail_next(proxy, faults.change_etag())
        other, content = get()
        assert content == CONTENT
        fail_next(proxy, faults.change_bytes())
        assert get() == (other, bytes(byte ^ 0xFF for byte in CONTENT))
        assert get() == (etag, CONTENT)
        assert other != etag


def test_a_range_can_be_ignored_and_an_address_expire(proxy: Proxy) -> None:
    fail_next(proxy, faults.ignore_range())
    assert ask(proxy, "GET", KEY, Range="bytes=5-9") == (200, CONTENT)
    fail_next(proxy, faults.expire())
    status, body = ask(proxy, "GET", KEY, Range="bytes=5-9")
    assert (status, b"AccessDenied" in body) == (403, True)
    assert ask(proxy, "GET", KEY, Range="bytes=5-9") == (206, CONTENT[5:10])


def test_slowness_takes_its_time(proxy: Proxy) -> None:
    def measure(fault: Fault) -> float:
        fail_next(proxy, fault)
        began = time.monotonic()
        assert ask(proxy, "GET", KEY) == (200, CONTENT)
        return time.monotonic() - began

    assert measure(faults.start_slowly(0.2)) >= 0.2
    assert 0.2 <= measure(faults.throttle(len(CONTENT) / 0.25)) < 2


def test_a_far_server_is_as_slow_on_each_connection(proxy: Proxy) -> None:
    with start_proxy(proxy.url, latency_s=0.1, rate=2e6) as far, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda _: ask(far, "GET", KEY), range(8)))
        took_s = time.monotonic() - began
    assert answers == [(200, CONTENT)] * 8
    assert 0.1 + len(CONTENT) / 2e6 <= took_s < 2  # and not eight times that


def test_a_process_of_its_own_is_as_far() -> None:
    with start_origin(file=CONTENT) as origin, start_proxy_process(origin.url, latency_s=0.1) as url:
        began = time.monotonic()
        with urllib.request.urlopen(f"{url}/file", timeout=10) as answer:
            assert answer.read() == CONTENT
        assert time.monotonic() - began >= 0.1


def test_attempts_are_counted_whatever_the_signature(proxy: Proxy) -> None:
    for target in ("/a?X-Amz-Signature=1", "/a?X-Amz-Signature=2", "/a?partNumber=1&Signature=1", "/b"):
        ask(proxy, "HEAD", target)
    ask(proxy, "HEAD", "/a", Range="bytes=0-1")
    assert [each.request.attempt for each in proxy.journal.exchanges] == [0, 1, 0, 0, 0]


def test_random_faults_are_the_same_in_any_order(proxy: Proxy) -> None:
    proxy.rule = faults.at_random(1, 0.5, [faults.refuse(500, "InternalError"), faults.refuse(503)])

    def ask_all(numbers: range) -> dict[int, int]:
        return {number: ask(proxy, "HEAD", f"/{number}")[0] for number in numbers}

    first = ask_all(range(40))
    assert set(first.values()) == {404, 500, 503}
    with start_proxy(proxy.url, proxy.rule) as second:
        proxy.rule = faults.never
        again = {n: ask(second, "HEAD", f"/{n}")[0] for n in reversed(range(40))}
    assert again == first


def test_stopping_ends_what_waits(proxy: Proxy) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        with start_proxy(proxy.url, lambda request: faults.start_slowly(60)) as slow:
            asked = pool.submit(ask, slow, "GET", KEY)
            while not slow.journal.exchanges:
                time.sleep(0.01)
        assert isinstance(asked.exception(), OSError | http.client.HTTPException)
    assert time.monotonic() - began < 10


def test_a_server_that_is_gone_resets_the_client() -> None:
    [port] = find_free_ports(1)
    with start_proxy(f"http://127.0.0.1:{port}") as proxy, pytest.raises(ConnectionError):
        ask(proxy, "GET", KEY)
