"""References to models: ``path[@revision][+lora[@revision]]``, or the same as a mapping.

This room touches no storage, so what is a path and what a revision is decided by the text alone:

* A ``+`` after the scheme of a URL separates the LoRA; a second one is an error.
* What follows the last ``@`` is the revision if it holds no ``/``, or begins with ``refs/`` as on the Hub.
  The user part of a URL (``sftp://me@host``) is none.
* Local paths that show themselves to be local (they begin with ``/``, ``.``, ``~`` or ``file:``) have no
  revisions: their ``@`` is part of the name.
* In the mapping form ``{path: …, revision: …}`` a path is literal, so any path can be written there.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, ValidationError, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from mergemill.engine.errors import CheckpointError, RecipeError
from mergemill.engine.recipe.faults import describe, make_faults, make_sentence, shorten
from mergemill.engine.recipe.leaves import OptionalText, Text, check_items, check_number
from mergemill.engine.recipe.shapes import Value
from mergemill.engine.storage.urls import find_secret, parse_place

_LOCAL = ("/", ".", "~", "file:")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_REVISED = re.compile(r"(?P<path>.+?)@(?P<revision>refs/[^@]+|[^@/]*)")


class WeightedAdapter(Value):
    """An adapter among several that are put onto one model."""

    called: ClassVar[str] = "an item of adapters"

    adapter: "ModelRef"
    """A folder, a name on the Hub or a URL."""
    weight: Annotated[float, BeforeValidator(check_number)] = 1.0
    """How often its change is taken."""


class ModelRef(Value):
    """A stored model: where it is, which revision, and the LoRA that is applied to it."""

    called: ClassVar[str] = "a model"

    path: Text
    """A local folder, org/name on the Hub, or a URL; as written, `~` not expanded."""
    revision: OptionalText = None
    """Branch, tag or commit."""
    lora: "ModelRef | None" = None
    """The adapter that is applied first; it has no `lora` of its own."""
    adapters: Annotated[tuple[WeightedAdapter, ...] | None, BeforeValidator(check_items), Field(min_length=1)] = None
    """Plain LoRA whose changes add up, instead of `lora`: `[{adapter: org/name, weight: 0.5}]`."""
    override_architecture: OptionalText = None
    """For mergekit: whose list of names to read the model by. Here names are read from its files; a warning says so."""

    @model_validator(mode="before")
    @classmethod
    def _read_forms(cls, data: Any) -> Any:
        if isinstance(data, str):
            return _split_reference(data)
        if isinstance(data, Mapping):
            return _join_model(data) if "model" in data else data
        if isinstance(data, cls):
            return data
        raise make_sentence(f"a model is written path[@revision][+lora] or as a mapping, not {describe(data)}")

    @model_validator(mode="after")
    def _check(self) -> "ModelRef":
        try:
            parse_place(self.path)
        except CheckpointError as error:
            raise make_sentence(str(error)) from None
        if self.lora and not self.lora._is_plain:
            raise make_faults([(("lora",), make_sentence("a LoRA has only a path and a revision"))])
        if self.adapters and self.lora:
            raise make_faults([(("adapters",), make_sentence("a model has lora or adapters, not both"))])
        for place, each in enumerate(self.adapters or ()):
            if not each.adapter._is_plain:
                words = make_sentence("an adapter has only a path and a revision")
                raise make_faults([(("adapters", place, "adapter"), words)])
        return self

    @property
    def _is_plain(self) -> bool:
        return self.lora is None and self.adapters is None and self.override_architecture is None

    def list_adapters(self) -> tuple[tuple["ModelRef", float], ...]:
        """Return the adapters that are applied, and how often each."""
        if self.adapters is not None:
            return tuple((each.adapter, each.weight) for each in self.adapters)
        return () if self.lora is None else ((self.lora, 1.0),)

    def __str__(self) -> str:
        """Return the short form, ``path@revision+lora@revision``; it leaves `override_architecture` out."""
        own = f"{self.path}@{self.revision}" if self.revision else self.path
        if self.adapters is not None:
            return own + "".join(f"+{each.weight:.17g}*{each.adapter}" for each in self.adapters)
        return f"{own}+{self.lora}" if self.lora else own

    @model_serializer(mode="plain")
    def _dump(self) -> str | dict[str, Any]:
        """The short form where reading it gives this reference again, else the mapping."""
        short = str(self)
        return short if _reads_as(short, self) else self._dump_mapping()

    def _dump_mapping(self) -> dict[str, Any]:
        lora: dict[str, Any] = {"lora": _dump_path(self.lora)} if self.lora else {}
        if self.adapters is not None:
            lora = {"adapters": [{"adapter": _dump_path(e.adapter), "weight": e.weight} for e in self.adapters]}
        override = self.override_architecture
        return {"model": _dump_path(self)} | lora | ({"override_architecture": override} if override else {})

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"description": cls.__doc__, "anyOf": [_SHORT_SCHEMA, _PATH_SCHEMA, _MAPPING_SCHEMA]}


_SHORT_SCHEMA: JsonSchemaValue = {
    "type": "string",
    "minLength": 1,
    "description": "path-or-repo[@revision][+lora[@revision]]",
}
_PATH_SCHEMA: JsonSchemaValue = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "revision": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
_MAPPING_SCHEMA: JsonSchemaValue = {
    "type": "object",
    "properties": {
        "model": {"anyOf": [_SHORT_SCHEMA, _PATH_SCHEMA]},
        "lora": {"anyOf": [_SHORT_SCHEMA, _PATH_SCHEMA]},
        "adapters": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"adapter": {"anyOf": [_SHORT_SCHEMA, _PATH_SCHEMA]}, "weight": {"type": "number"}},
                "required": ["adapter"],
                "additionalProperties": False,
            },
        },
        "override_architecture": {"type": "string"},
    },
    "required": ["model"],
    "additionalProperties": False,
}


def _dump_path(ref: ModelRef) -> dict[str, str]:
    return {"path": ref.path} | ({"revision": ref.revision} if ref.revision else {})


def _reads_as(short: str, ref: ModelRef) -> bool:
    try:
        return ModelRef.model_validate(short) == ref
    except ValidationError:
        return False


def _join_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{path, revision, lora, …}`` for ``{model: {path, revision} or text, lora, …}``."""
    inner = data["model"]
    if isinstance(inner, str):
        inner = _split_reference(inner)
    if not isinstance(inner, Mapping):
        raise make_sentence(f"'model' must be text or a mapping with path and revision, not {describe(inner)}")
    rest = {key: value for key, value in data.items() if key != "model"}
    if twice := sorted(inner.keys() & rest.keys()):
        raise make_faults([((key,), make_sentence(f"'{key}' is given twice for one model")) for key in twice])
    return {**inner, **rest}


def _split_reference(text: str) -> dict[str, Any]:
    if secret := find_secret(text):
        raise make_sentence(secret)
    model, plus, lora = _split_plus(text)
    if "+" in _split_scheme(lora)[1]:
        raise _bad(text, "it has more than one '+'; a path with '+' is written as a mapping {model: {path: …}}")
    if plus and not lora:
        raise _bad(text, "after '+' comes the path of a LoRA")
    adapter = {"lora": _split_revision(lora, whole=text)} if plus else {}
    return {**_split_revision(model, whole=text), **adapter}


def _split_plus(text: str) -> tuple[str, str, str]:
    scheme, rest = _split_scheme(text)
    model, plus, lora = rest.partition("+")
    return scheme + model, plus, lora


def _split_scheme(text: str) -> tuple[str, str]:
    found = _SCHEME.match(text)
    return (found.group(), text[found.end() :]) if found else ("", text)


def _split_revision(text: str, *, whole: str) -> dict[str, str]:
    if not text.strip():
        raise _bad(whole, "its path is empty")
    found = None if text.lower().startswith(_LOCAL) else _REVISED.fullmatch(text)
    if found is None or _is_user_part(found["path"]):
        return {"path": text}
    if not found["revision"]:
        raise _bad(whole, "after '@' comes a revision")
    return {"path": found["path"], "revision": found["revision"]}


def _is_user_part(path: str) -> bool:
    scheme, rest = _split_scheme(path)
    return scheme.lower() not in ("", "hf://") and "/" not in rest


def _bad(text: str, why: str) -> PydanticCustomError:
    return make_sentence(f"'{shorten(text)}' is not a model: {why}")


def parse_reference(given: object) -> ModelRef:
    """Return the model that a text, a mapping or a reference names outside of a recipe; `RecipeError` for none."""
    try:
        return ModelRef.model_validate(given)
    except ValidationError as error:
        raise RecipeError(error.errors(include_url=False)[0]["msg"]) from None
