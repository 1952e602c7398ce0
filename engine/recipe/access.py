"""How storage is reached, as recipes and cluster files say it: what the environment does not say, and no secret."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from mergemill.engine.recipe.faults import describe, make_faults, make_predicate
from mergemill.engine.recipe.shapes import FrozenMap
from mergemill.engine.storage.store import READER, READERS
from mergemill.engine.storage.urls import find_secret

_FILES = ("username", "port", "timeout", "tls")
_GOOGLE = ("project", "endpoint_url", "requester_pays", "default_location", "access", "consistency")
_AZURE = ("account_name", "account_host", "anon", "location_mode")
ALLOWED = {
    **dict.fromkeys(("s3", "s3a"), ("profile", "region", "endpoint_url", "addressing_style", "anonymous")),
    **dict.fromkeys(("gs", "gcs"), _GOOGLE),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), _AZURE),
    **dict.fromkeys(("sftp", "ssh", "ftp", "smb"), _FILES),
    **dict.fromkeys(("hdfs", "webhdfs", "webHDFS"), ("user", "port", "use_https")),
}
"""What may stand there, by scheme: names that hold no secret in any driver; of other kinds of storage none is known.

Beside them each scheme, and ``*`` for all of them, may say its `READER`.
"""


class StoreOptions(FrozenMap[str | int | bool]):
    """Options of one kind of storage, by name."""

    __slots__ = ()

    holds: ClassVar[Any] = str | int | bool


def _check_options(value: object, *, why: str) -> object:
    """Refuse secrets: what a recipe says is copied beside the output, what a cluster file says is sent to workers."""
    if not isinstance(value, Mapping):
        return value
    faults = [
        ((scheme, name), make_predicate(words))
        for scheme, options in value.items()
        for name, option in (options.items() if isinstance(options, Mapping) else ())
        if (words := _find_fault(str(scheme), str(name), option, why))
    ]
    if faults:
        raise make_faults(faults)
    return value


def _find_fault(scheme: str, name: str, option: object, why: str) -> str:
    """Return what is wrong with an option, without repeating its value; empty if nothing is."""
    if name == READER:
        return "" if option in READERS else f"must be {' or '.join(READERS)}"
    allowed = ALLOWED.get(scheme, ())
    if name not in allowed:
        known = f"known are {', '.join(allowed)}" if allowed else f"none of {scheme}:// is known"
        return f"may be a secret, and {why}; {known}; {_say_where(scheme, name)}"
    if not isinstance(option, str | int | bool):
        return f"must be text, a number or true, not {describe(option)}"
    if isinstance(option, str) and (find_secret(option) or "@" in option):
        return f"holds a user or a query, and {why}; {_say_where(scheme, name)}"
    return ""


def _say_where(scheme: str, name: str) -> str:
    """Return where an option may be given that is not written down."""
    if scheme in ("s3", "s3a"):
        return "set it in the environment or a profile"
    if scheme in ("hf", "http", "https"):
        return "set it in the environment"
    variable = re.sub(r"\W", "_", f"FSSPEC_{scheme}_{name}").upper()
    return f"set {variable} in the environment, here and on workers"


class StorageOptions(FrozenMap[StoreOptions]):
    """Options of storage by the scheme of its URLs: `{s3: {profile: team, endpoint_url: https://…}}`."""

    __slots__ = ()

    holds: ClassVar[Any] = StoreOptions


OptionalStorageOptions = Annotated[
    StorageOptions | None,
    BeforeValidator(lambda value: _check_options(value, why="a recipe is copied beside the output")),
]
OptionalClusterStorageOptions = Annotated[
    StorageOptions | None,
    BeforeValidator(lambda value: _check_options(value, why="a cluster file is passed on, and sent to every worker")),
]
