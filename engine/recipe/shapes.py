"""What every mapping of the language has in common: known keys, needed keys, keys that exclude each other.

`Value` is the base of the frozen models, `FrozenMap` the base of mappings whose keys are the user's own.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mergemill.engine.recipe.faults import (
    Loc,
    describe,
    make_faults,
    make_predicate,
    make_sentence,
    shorten,
    suggest,
)

V = TypeVar("V")


class Value(BaseModel):
    """A frozen mapping with a closed set of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    called: ClassVar[str]
    one_of: ClassVar[tuple[str, ...]] = ()
    elsewhere: ClassVar[Mapping[str, str]] = {}  # keys of other tools and older recipes, and what is right here

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            right = (
                f"; write {{model: {shorten(data)}}}" if isinstance(data, str) and "model" in cls.known_keys() else ""
            )
            raise make_sentence(f"{cls.called} must be a mapping with {cls._name_keys()}, not {describe(data)}{right}")
        if faults := [*cls._find_unknown(data), *cls._find_missing(data), *cls._find_rivals(data)]:
            raise make_faults(faults)
        return data

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return the keys that a user may write."""
        return [name for name, field in cls.model_fields.items() if not field.exclude]

    @classmethod
    def _name_keys(cls) -> str:
        return "the keys " + ", ".join(cls.known_keys())

    @classmethod
    def _find_unknown(cls, data: Mapping[str, Any]) -> Iterator[tuple[Loc, PydanticCustomError]]:
        known = cls.known_keys()
        for key in data:
            if key not in known:
                right = cls.elsewhere.get(str(key)) or suggest(str(key), known)
                yield (key,), make_sentence(f"unknown key '{shorten(key)}'; {right}")

    @classmethod
    def _find_missing(cls, data: Mapping[str, Any]) -> Iterator[tuple[Loc, PydanticCustomError]]:
        unknown = any(cls._find_unknown(data))  # then a missing key is most likely a misspelt one
        for name, field in cls.model_fields.items():
            if field.is_required() and name not in data and not unknown:
                yield (), make_sentence(f"{cls.called} needs the key '{name}'")

    @classmethod
    def _find_rivals(cls, data: Mapping[str, Any]) -> Iterator[tuple[Loc, PydanticCustomError]]:
        given = [name for name in data if name in cls.one_of and data[name] is not None]
        wanted = f"{cls.called} needs exactly one of {', '.join(cls.one_of)}"
        if cls.one_of and not given and not any(cls._find_unknown(data)):
            yield (), make_sentence(f"{wanted}; none is here")
        for name in given[1:]:
            yield (name,), make_sentence(f"{wanted}; '{name}' stands beside '{given[0]}'")


class FrozenMap(Mapping[str, V]):
    """An immutable mapping from the user's names to values, in the order written (equality sees it)."""

    __slots__ = ("_items",)

    holds: ClassVar[Any]

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, name: str) -> V:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and tuple(self.items()) == tuple(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner = handler.generate_schema(dict[str, cls.holds])  # type: ignore[name-defined]
        checked = core_schema.no_info_before_validator_function(_check_map, inner)
        return core_schema.no_info_after_validator_function(
            cls,
            checked,
            serialization=core_schema.wrap_serializer_function_ser_schema(_dump_map, schema=inner),
        )


def _check_map(value: object) -> object:
    if value is None:  # `parameters:` with nothing after it
        return {}
    if not isinstance(value, Mapping):
        raise make_predicate(f"must be a mapping of names to values, not {describe(value)}")
    if blank := [name for name in value if not str(name).strip()]:
        raise make_faults([((name,), make_predicate("must have a name before the colon")) for name in blank])
    return dict(value)


def _dump_map(value: Mapping[str, Any], handler: core_schema.SerializerFunctionWrapHandler) -> Any:
    return handler(dict(value))
