"""moto's S3 server for the tests: the second opinion. It starts in a second and keeps its objects in memory.

It takes any key and does not check signatures: what SeaweedFS refuses for its signature, moto does as asked.
"""

import contextlib
import functools
import importlib.util
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from servers.processes import find_free_ports, start_on_free_ports, start_server
from servers.s3 import S3

NEEDED = ("boto3", "moto", "flask", "flask_cors")


def find_skip_reason() -> str | None:
    """Return why moto cannot run here, or None where it can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed, for moto's server: {', '.join(missing)}" if missing else None


@contextlib.contextmanager
def start_moto(folder: Path, *buckets: str) -> Iterator[S3]:
    """Start a server whose log goes to `folder`, which exists, and make `buckets`."""
    with start_on_free_ports(functools.partial(_start_once, folder, buckets)) as server:
        yield server


@contextlib.contextmanager
def _start_once(folder: Path, buckets: tuple[str, ...]) -> Iterator[S3]:
    [port] = find_free_ports(1)
    server = S3(f"http://127.0.0.1:{port}", secrets.token_hex(10).upper(), secrets.token_urlsafe(30))
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with start_server(command, folder / "moto.log", functools.partial(_takes_buckets, server, buckets)):
        yield server


def _takes_buckets(server: S3, buckets: tuple[str, ...]) -> bool:
    """Make the buckets; return whether that worked."""
    from botocore.exceptions import EndpointConnectionError

    with contextlib.closing(server.connect(retries={"total_max_attempts": 1})) as client:
        try:
            client.list_buckets()
        except EndpointConnectionError:
            return False
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
    return True
