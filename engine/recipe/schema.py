"""The JSON schema of recipes, whose descriptions are the texts that stand below the fields of the models."""

import ast
import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from textwrap import dedent
from typing import Any

from mergemill.engine.recipe.shapes import Value
from mergemill.engine.recipe.values import Recipe

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(methods: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON schema of the recipe language, for editors that check and complete from it.

    methods: names that editors offer where a method is named; a name of one's own is valid too.
    """
    schema = Recipe.model_json_schema()
    models = {model.__name__: model for model in Value.__subclasses__()}
    for name, shape in {Recipe.__name__: schema, **schema["$defs"]}.items():
        _describe(shape.get("properties", {}), models[name])
    if methods:
        named = schema["properties"]["merge_method"]
        schema["properties"]["merge_method"] = {
            **{key: value for key, value in named.items() if key not in ("type", "minLength")},
            "anyOf": [{"enum": [*methods]}, {"type": "string", "minLength": 1}],
        }
    source = schema["$defs"]["Tokenizer"]["properties"]["source"]
    short = {
        **source,
        "description": "The short form of `tokenizer: {source: …}`: `union`, `base`, or a model.",
    }
    short.pop("default", None)
    schema["properties"]["tokenizer_source"] = short
    return {"$schema": SCHEMA_DIALECT, **schema, "oneOf": [{"required": [name]} for name in Recipe.one_of]}


def _describe(properties: dict[str, dict[str, Any]], model: type[Value]) -> None:
    """Add descriptions in place."""
    for name, text in _read_docstrings(model):
        if name in properties:
            properties[name] = dict(sorted({**properties[name], "description": text}.items()))


def _read_docstrings(model: type[Value]) -> Iterator[tuple[str, str]]:
    """Yield each field's name and the text below it; Pydantic would read the source at every import instead."""
    (definition,) = ast.parse(dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in pairwise(definition.body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(below, ast.Expr):
            continue
        assert isinstance(field.target, ast.Name)
        text = ast.literal_eval(below.value)
        yield field.target.id, inspect.cleandoc(text)
