"""How S3 is reached: s3fs, fsspec's file system, for what is asked; boto3's client for what is hot.

Both find credentials, endpoints and proxies as the AWS tools do, and are set alike.
"""

import functools
from collections.abc import Mapping
from typing import Any

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.connections import CONNECT_S, READ_S
from mergemill.engine.storage.fetch import CONNECTIONS
from mergemill.engine.storage.s3_errors import shorten
from mergemill.engine.storage.tries import note_retry

ATTEMPTS = 5  # by botocore, of a request that is refused; with back-off and jitter


def open_client(options: Mapping[str, Any]) -> Any:
    """Return a new client of boto3, as the options, the environment and the AWS profile say.

    What is sent is signed with its SHA-256 only where the connection itself does not protect it.
    """
    client = _open_client(options, None)
    return _open_client(options, False) if _is_protected(client) else client


def open_files(options: Mapping[str, Any], client: Any) -> Any:
    """Return a new file system of s3fs that reaches what `client` does.

    It is nobody else's and keeps no listings (fsspec shares file systems within a process, and s3fs remembers what it
    has listed); and it does not try again itself, which `tries` does: botocore beneath it does, as of boto3.
    """
    import aiobotocore.session
    import s3fs

    session = aiobotocore.session.AioSession(profile=options.get("profile"))
    session.register_component("data_loader", _loader())
    files = s3fs.S3FileSystem(
        anon=bool(options.get("anonymous")),
        endpoint_url=options.get("endpoint_url"),
        client_kwargs={"region_name": options["region"]} if "region" in options else {},
        config_kwargs=_make_settings(options, False if _is_protected(client) else None),
        session=session,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    files.retries = 1
    files.s3.meta.events.register("before-send.s3", _note_attempt)
    return files


def _is_protected(client: Any) -> bool:
    return bool(client.meta.endpoint_url.startswith("https://"))


def _make_settings(options: Mapping[str, Any], payload_signing: bool | None) -> dict[str, Any]:
    s3: dict[str, Any] = {"payload_signing_enabled": payload_signing}
    if "addressing_style" in options:
        s3["addressing_style"] = options["addressing_style"]
    return {
        "max_pool_connections": CONNECTIONS,
        "connect_timeout": CONNECT_S,
        "read_timeout": READ_S,
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "signature_version": UNSIGNED if options.get("anonymous") else "s3v4",
        "s3": s3,
    }


def _open_client(options: Mapping[str, Any], payload_signing: bool | None) -> Any:
    try:
        shared = botocore.session.Session()
        shared.register_component("data_loader", _loader())
        session = boto3.session.Session(
            profile_name=options.get("profile"), region_name=options.get("region"), botocore_session=shared
        )
        settings = Config(**_make_settings(options, payload_signing))
        client = session.client("s3", endpoint_url=options.get("endpoint_url"), config=settings)
    except (BotoCoreError, ValueError) as error:  # a profile that nobody has, an endpoint that is no URL
        raise CheckpointError(f"s3://: {shorten(error)}") from error
    client.meta.events.register("before-send.s3", _note_attempt)
    return client


def _note_attempt(request: Any, **_: Any) -> None:
    """Count what botocore itself tries again; its header says which attempt a request is."""
    said = request.headers.get("amz-sdk-request", "")
    said = said.decode() if isinstance(said, bytes) else str(said)
    if "attempt=" in said and "attempt=1" not in said:
        note_retry()


@functools.cache
def _loader() -> Any:
    """What reads the descriptions of services, once: that takes a quarter of a second, the rest of a client 30 ms."""
    return botocore.session.Session().get_component("data_loader")
