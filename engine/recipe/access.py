"""How storage is reached, as recipes and cluster files say it: what the environment does not say, and no secret."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from mergemill.engine.recipe.faults import describe, make_faults, make_predicate
from mergemill.engine.recipe.shapes import FrozenMap

_SECRET = ("key", "secret", "token", "password", "credential", "connection_string", "sas")


class StoreOptions(FrozenMap[str | int | bool]):
    """Options of one kind of storage, by name."""

    __slots__ = ()

    holds: ClassVar[Any] = str | int | bool


def _check_options(value: object, *, why: str) -> object:
    """Refuse secrets: what a recipe says is copied beside the output, what a cluster file says is sent to workers."""
    if not isinstance(value, Mapping):
        return value
    faults = []
    for scheme, options in value.items():
        for name, option in options.items() if isinstance(options, Mapping) else ():
            if any(word in str(name).lower() for word in _SECRET):
                words = f"is a secret, and {why}; set it in the environment or a profile"
                faults.append(((scheme, name), make_predicate(words)))
            elif not isinstance(option, str | int | bool):
                faults.append(
                    ((scheme, name), make_predicate(f"must be text, a number or true, not {describe(option)}"))
                )
    if faults:
        raise make_faults(faults)
    return value


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
