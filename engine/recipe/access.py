"""How a recipe's storage is reached: what the environment does not say, and no secret."""

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


def _check_options(value: object) -> object:
    """Refuse what would be copied beside the output, where no secret belongs."""
    if not isinstance(value, Mapping):
        return value
    faults = []
    for scheme, options in value.items():
        for name, option in options.items() if isinstance(options, Mapping) else ():
            if any(word in str(name).lower() for word in _SECRET):
                words = "is a secret, and a recipe is copied beside the output; set it in the environment or a profile"
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


OptionalStorageOptions = Annotated[StorageOptions | None, BeforeValidator(_check_options)]
