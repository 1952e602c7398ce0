"""What a client needs to reach a Dask cluster over TLS, and what it means when it is refused.

Certificates are configured as Dask has it, ``distributed.comm.tls``; nothing of that is mergemill's.
"""

import json
import os

import dask

from mergemill.engine.errors import ClusterError
from mergemill.engine.runs.worker.workers import holds_more, is_scheduler_file
from mergemill.engine.storage.bounds import NOTE_BYTES
from mergemill.engine.storage.regular import read_regular

_TLS = "distributed.comm.tls"
_NEEDED = ("ca-file", "client.cert")
_FILES = (*_NEEDED, "client.key")  # the key may be in the certificate's file


def check_certificates(scheduler: str) -> None:
    """Raise `ClusterError` where a scheduler, by its address or file, asks for certificates that are not configured."""
    if not _find_address(scheduler).startswith("tls://"):
        return
    given = {name: dask.config.get(f"{_TLS}.{name}", None) for name in _FILES}
    if missing := [_say_variable(name) for name in _NEEDED if not given[name]]:
        raise ClusterError(
            f"{scheduler}: talks TLS, and Dask is told of no certificate here; set {' and '.join(missing)}, and "
            f"{_say_variable('client.key')} (or DASK_CONFIG to a file with {_TLS})"
        )
    for name, value in given.items():
        if value and not _is_text(str(value)) and not os.access(value, os.R_OK):
            raise ClusterError(f"{scheduler}: {value}, which {_say_variable(name)} names, cannot be read")


def explain_refusal(scheduler: str, error: BaseException) -> str:
    """Return why no scheduler answers, in one line."""
    why = " ".join(str(error).split())
    address = _find_address(scheduler)
    if any(word in f"{why} {error.__cause__}" for word in ("TLS certificate", "SSL")):
        return (
            f"{scheduler}: its certificate and the one of this client are not of one authority "
            f"({_say_variable('ca-file')}={dask.config.get(f'{_TLS}.ca-file', None)}): {why}"
        )
    if address.startswith("tcp://") and "closed" in why:
        return f"{scheduler}: the connection was closed at once; a scheduler that talks TLS is tls://…: {why}"
    return f"{scheduler}: no Dask scheduler answers there: {why}"


def read_address(scheduler: str) -> str:
    """Return the address of a scheduler that a file may name; OSError or ValueError where that does not tell it."""
    if not is_scheduler_file(scheduler):
        return scheduler
    try:
        told = json.loads(read_regular(scheduler, NOTE_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    address = told.get("address") if isinstance(told, dict) else None
    if not isinstance(address, str) or holds_more(address):
        raise ValueError("its 'address' must be that of a scheduler, such as tcp://host:port")
    return address


def _find_address(scheduler: str) -> str:
    try:
        return read_address(scheduler)
    except (OSError, ValueError):
        return ""  # who opens it says what is wrong


def _is_text(value: str) -> bool:
    """Whether a certificate is given itself, not by its path."""
    return "\n" in value


def _say_variable(name: str) -> str:
    return "DASK_DISTRIBUTED__COMM__TLS__" + name.replace(".", "__").replace("-", "_").upper()
