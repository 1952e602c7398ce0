"""A recipe as a form, and back: both are views of the YAML text, which alone is the recipe.

The form knows what most recipes have. What it does not know stays in the text as it is. An edit of the form writes the
text anew, in which comments below the first lines are lost; one that changes nothing leaves it alone.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mergemill.engine import errors, read_recipe

KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "tokenizer_source")
WIDTH = 100
MOST_DEPTH = 50  # of brackets, as in any recipe
MOST_CHARACTERS = 64 << 10  # of a text
_BEYOND = {
    "slices": "it stacks layers",
    "modules": "it has modules",
    "experts": "it is a mixture of experts",
    "adapters": "it joins adapters",
}


class NoForm(ValueError):
    """The form cannot show a text; the words say why."""


@dataclass(frozen=True, slots=True)
class ModelLine:
    """A model of the form."""

    model: str
    parameters: Mapping[str, str]  # values as YAML of one line
    place: int | None = None  # in the text's list; None: a new one


@dataclass(frozen=True, slots=True)
class RecipeForm:
    """A recipe of whole models, as the form shows it; empty texts stand for what is not given."""

    merge_method: str = ""
    base_model: str = ""
    models: tuple[ModelLine, ...] = ()
    parameters: Mapping[str, str] | None = None
    dtype: str = ""
    tokenizer_source: str = ""
    others: tuple[str, ...] = ()  # keys that stay as the text has them


def read_form(text: str) -> RecipeForm:
    """Return the form of a text; `NoForm` where the form cannot show it.

    >>> read_form("merge_method: ties\\nmodels: [{model: a, parameters: {weight: [0, 1]}}]").models[0].parameters
    {'weight': '[0, 1]'}
    """
    return make_form(_load_all(text), text)


def make_form(documents: Sequence[Any], text: str) -> RecipeForm:
    """Return the form of the documents that a text holds, as plain data."""
    data = _find_data(documents, text)
    rows = [_read_row(place, entry) for place, entry in enumerate(_as(list, data.get("models"), "models"))]
    return RecipeForm(
        merge_method=_say(data.get("merge_method")),
        base_model=_say(data.get("base_model")),
        models=tuple(rows),
        parameters=_say_all(_as(dict, data.get("parameters"), "parameters")),
        dtype=_say(data.get("dtype")),
        tokenizer_source=_say(data.get("tokenizer_source")),
        others=tuple(str(key) for key in data if key not in KEYS),
    )


def write_form(text: str, form: RecipeForm) -> str:
    """Return the text with what the form says; `NoForm` where the text is none that the form shows."""
    data = _find_data(_load_all(text), text)
    entries = _as(list, data.get("models"), "models")
    told = {
        "merge_method": form.merge_method.strip(),
        "base_model": _parse_model(form.base_model),
        "models": [_write_row(row, entries) for row in form.models],
        "parameters": _parse_all(form.parameters or {}),
        "dtype": form.dtype.strip(),
        "tokenizer_source": _parse_model(form.tokenizer_source),
    }
    made = {key: told[key] for key in KEYS if told[key]} | {key: data[key] for key in data if key not in KEYS}
    if made == data:
        return text
    kept = {key: made[key] for key in data if key in made}  # in the text's order, where nothing is new
    ordered = kept if kept.keys() == made.keys() else made
    try:
        return _find_head(text) + "".join(_dump(key, value) for key, value in ordered.items())
    except (yaml.YAMLError, ValueError, RecursionError):
        raise NoForm("a value cannot be written as YAML") from None


def parse_form(given: Mapping[str, Any]) -> RecipeForm:
    """Return the form that JSON says; `NoForm` where it is none."""
    try:
        rows = [_parse_row(row) for row in given["models"]]
        return RecipeForm(
            merge_method=str(given["merge_method"]),
            base_model=str(given["base_model"]),
            models=tuple(rows),
            parameters=_texts(given["parameters"]),
            dtype=str(given["dtype"]),
            tokenizer_source=str(given["tokenizer_source"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise NoForm(f"this is no form: {error}") from None


def _load_all(text: str) -> list[Any]:
    if len(text) > MOST_CHARACTERS:
        raise NoForm("it is too long")
    if all(line.strip()[:1] in ("", "#") for line in text.splitlines()):
        return []
    try:
        return [document.data for document in read_recipe(text)]
    except errors.RecipeError:
        raise NoForm("the YAML cannot be read") from None


def _find_data(documents: Sequence[Any], text: str) -> dict[str, Any]:
    if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
        raise NoForm("it has aliases")
    if len(documents) > 1:
        raise NoForm("it has stages, which are several documents")
    data = documents[0] if documents else {}
    if not isinstance(data, dict):
        raise NoForm("it is no mapping of keys to values")
    for key, why in _BEYOND.items():
        if key in data:
            raise NoForm(why)
    return data


def _find_depth(text: str) -> int:
    depth = deepest = 0
    for mark in text:
        depth += (mark in "[{") - (mark in "]}")
        deepest = max(deepest, depth)
    return deepest


def _read_row(place: int, entry: object) -> ModelLine:
    if isinstance(entry, str):
        return ModelLine(entry, {}, place)
    found = _as(dict, entry, "an item of models")
    return ModelLine(_say(found.get("model")), _say_all(_as(dict, found.get("parameters"), "parameters")), place)


def _write_row(row: ModelLine, entries: Sequence[Any]) -> dict[str, Any]:
    known = row.place is not None and 0 <= row.place < len(entries) and isinstance(entries[row.place], dict)
    old = entries[row.place] if known and row.place is not None else {}
    new = {"model": _parse_model(row.model), "parameters": _parse_all(row.parameters)}
    return {key: value for key, value in {**old, **new}.items() if key != "parameters" or value}


def _as(kind: type, value: object, what: str) -> Any:
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise NoForm(f"{what} is written otherwise there")
    return value


def _dump(key: str, value: object) -> str:
    flow = None if isinstance(value, dict | list) else False  # the innermost mappings and lists on one line
    text: str = yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=flow, width=WIDTH, allow_unicode=True)
    return text


def _say(value: object) -> str:
    """Return a value as YAML of one line; a text as it is, unless that would be another value."""
    if value is None:
        return ""
    if isinstance(value, str) and _parse_model(value) == value:
        return value
    return _say_value(value)


def _say_all(values: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): _say_value(value) for key, value in values.items()}


def _say_value(value: object) -> str:
    text: str = yaml.safe_dump([value], default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return text.strip()[1:-1]


def _parse_model(text: str) -> Any:
    """Return a reference: a text, or a mapping where that is what is written."""
    text = text.strip()
    return _parse(text) if text.startswith("{") else text


def _parse_all(texts: Mapping[str, str]) -> dict[str, Any]:
    return {key: _parse(text) for key, text in texts.items() if text.strip()}


def _parse(text: str) -> Any:
    """Return a value of a field; what is no YAML stays a text, of which the recipe's check will say what is wrong."""
    if len(text) > MOST_CHARACTERS or _find_depth(text) > MOST_DEPTH:  # which takes a parser of YAML minutes
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return text


def _texts(given: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in given.items()}


def _parse_row(given: Mapping[str, Any]) -> ModelLine:
    place = given.get("place")
    if place is not None and type(place) is not int:
        raise TypeError("the place of a model is no whole number")
    return ModelLine(str(given["model"]), _texts(given["parameters"]), place)


def _find_head(text: str) -> str:
    """Return the comments before the first key."""
    lines = text.splitlines(keepends=True)
    count = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "".join(lines[:count])
