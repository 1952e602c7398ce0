"""A document with ``adapters:``, which are combined to one adapter, as a frozen value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic.json_schema import SkipJsonSchema

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.document import Form, read_documents
from mergemill.engine.recipe.faults import describe, make_predicate, suggest
from mergemill.engine.recipe.leaves import OptionalDtype, OptionalText, check_items
from mergemill.engine.recipe.parsing import FORM, parse_value, read_text
from mergemill.engine.recipe.references import ModelRef
from mergemill.engine.recipe.settings import Parameters
from mergemill.engine.recipe.shapes import Value
from mergemill.engine.storage.urls import parse_path

ADAPTERS_FORM = Form("a document of adapters", "adapters and one of combination_type, merge_method")


SPACES = ("delta", "core", "knots")


def _check_space(value: object) -> object:
    if value not in SPACES:
        hint = suggest(value, SPACES) if isinstance(value, str) else f"known here: {', '.join(SPACES)}"
        raise make_predicate(f"is {describe(value)}, an unknown space; {hint}")
    return value


def _check_rank(value: object) -> object:
    if value == "full" or _is_rank(value):
        return value
    if not isinstance(value, Mapping) or not value:
        words = "must be a whole number from 1 on, full, {energy: SHARE}, or ranks by module, not"
        raise make_predicate(f"{words} {describe(value)}")
    if "energy" not in value:
        wrong = next((key for key, rank in value.items() if not isinstance(key, str) or not _is_rank(rank)), None)
        if wrong is not None:
            raise make_predicate(f"has {describe(value[wrong])} for {wrong}; ranks are whole numbers from 1 on")
        return value
    share, most = value["energy"], value.get("max_rank", 1)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise make_predicate(f"has an energy of {describe(share)}; it is a share, above 0 and up to 1")
    if not _is_rank(most) or value.keys() - {"energy", "max_rank"}:
        raise make_predicate("by energy is {energy: SHARE}, or {energy: SHARE, max_rank: R} with R from 1 on")
    return value


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class AdapterEntry(Value):
    """An adapter among those that are combined."""

    called: ClassVar[str] = "an item of adapters"

    adapter: ModelRef
    """A folder, a name on the Hub or a URL."""
    parameters: Parameters = Parameters()
    """Settings of this adapter, such as its weight."""


class AdapterRecipe(Value):
    """Adapters that are combined to one."""

    called: ClassVar[str] = "a document of adapters"
    one_of: ClassVar[tuple[str, ...]] = ("combination_type", "merge_method")

    adapters: Annotated[tuple[AdapterEntry, ...], BeforeValidator(check_items), Field(min_length=1)]
    """What is combined."""
    base_model: ModelRef | None = None
    """The model that the result names as its base; else the first adapter's."""
    combination_type: OptionalText = None
    """peft's word, and peft's formula: linear, svd, ties, ties_svd, dare_linear, …"""
    merge_method: OptionalText = None
    """A method of `mergemill methods`, on the changes, over a base of zeros."""
    space: Annotated[Literal["delta", "core", "knots"], BeforeValidator(_check_space)] = "delta"
    """Where the method sees the changes: whole, in the bases of all factors, or aligned (KnOTS)."""
    rank: Annotated[int | Literal["full"] | Mapping[str, int | float], BeforeValidator(_check_rank)] = "full"
    """Of the result of a method: a number, `full`, `{energy: 0.9}` (the least that keeps this share of the squares of
    the singular values; with `max_rank: 16`, no more), or one for each module."""
    parameters: Parameters = Parameters()
    """Settings that hold for all."""
    dtype: OptionalDtype = None
    """The dtype that is written; else that of the adapters."""
    text: Annotated[SkipJsonSchema[str], Field(exclude=True, repr=False)] = ""
    """The file's text as it was read."""
    file: Annotated[SkipJsonSchema[str], Field(exclude=True, repr=False)] = ""
    """The name that messages give the file."""

    @property
    def energy(self) -> float | None:
        """The share of the squares that ranks keep, where they hang on that."""
        return self.rank.get("energy") if isinstance(self.rank, Mapping) else None

    def find_rank(self, module: str, most: int) -> int | None:
        """Return the rank of a module, of which `most` is the largest; None where the document has none for it."""
        if self.rank == "full":
            return most
        found = self.rank.get(module) if isinstance(self.rank, Mapping) else self.rank
        return None if found is None else min(int(found), most)


GivenAdapters = AdapterRecipe | Mapping[str, Any] | str | Path
"""The document, a mapping of what would stand in its file, the file's path, or YAML text, as for a recipe."""


def names_adapters(given: Any) -> bool:
    """Whether a mapping, a file or YAML text is such a document, and no recipe: it has the key ``adapters``."""
    if isinstance(given, Mapping):
        return "adapters" in given
    if not isinstance(given, str | Path):
        return False
    text, name = _read(given)
    first = read_documents(text, FORM, name=name)[0]
    return isinstance(first.data, dict) and "adapters" in first.data


def load_adapters(given: GivenAdapters) -> AdapterRecipe:
    """Return the document that is given; `RecipeError` where it is not valid."""
    if isinstance(given, AdapterRecipe):
        return given
    if isinstance(given, Mapping):
        return parse_adapters(json.dumps(dict(given), indent=2, default=str) + "\n", name="recipe")
    text, name = _read(given)
    return parse_adapters(text, name=name)


def _read(given: str | Path) -> tuple[str, str]:
    """Return YAML text and what it is called."""
    if isinstance(given, str) and (len(given.splitlines()) > 1 or given.lstrip().startswith("{")):
        return given, "recipe"
    path = parse_path(given, RecipeError, what="a recipe")
    return read_text(path), str(path)


def parse_adapters(text: str, *, name: str = "recipe.yml") -> AdapterRecipe:
    """Return what the YAML `text` says; `RecipeError`, one line that begins with ``name:line:``."""
    return parse_value(AdapterRecipe, ADAPTERS_FORM, text, name=name).model_copy(update={"text": text, "file": name})
