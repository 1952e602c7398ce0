"""The JSON schema of recipes, whose descriptions are the texts that stand below the fields of the models."""

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from textwrap import dedent
from typing import Any

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.adapters import AdapterRecipe
from mergemill.engine.recipe.mixtures import Mixture
from mergemill.engine.recipe.shapes import Value
from mergemill.engine.recipe.values import Recipe

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


# What `mergemill merge` takes beside recipes: a document with `experts:`, one with `adapters:`.
_MODELS: dict[str, type[Value]] = {"mixture": Mixture, "adapters": AdapterRecipe}


def recipe_schema(
    methods: Sequence[str] = (), of: str = "recipe", *, post: Sequence[str] = (), coefficients: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the JSON schema of the recipe language, for editors that check and complete from it.

    methods: names that editors offer where a method is named; a name of one's own is valid too. post, coefficients: all
    names of steps after a method, and of coefficients before one; there are no others. of: which document it describes:
    ``recipe``, ``mixture`` or ``adapters``.
    """
    if of not in ("recipe", *_MODELS):
        raise RecipeError(f"there is no schema of {of!r}; there are those of recipe, {', '.join(_MODELS)}")
    if of != "recipe":
        model = _MODELS[of]
        rivals = {"oneOf": [{"required": [name]} for name in model.one_of]} if model.one_of else {}
        schema = _make_schema(model)
        _offer_methods(schema["properties"], methods)
        return {"$schema": SCHEMA_DIALECT, **schema, **rivals}
    schema = _make_schema(Recipe)
    _offer_methods(schema["properties"], methods)
    for name, known in (("post", post), ("coefficients", coefficients)):
        if known:
            _name_steps(schema, name, known)
    source = schema["$defs"]["Tokenizer"]["properties"]["source"]
    short = {
        **source,
        "description": "The short form of `tokenizer: {source: …}`: `union`, `base`, or a model.",
    }
    short.pop("default", None)
    schema["properties"]["tokenizer_source"] = short
    return {"$schema": SCHEMA_DIALECT, **schema, "oneOf": [{"required": [name]} for name in Recipe.one_of]}


def _offer_methods(properties: dict[str, Any], methods: Sequence[str]) -> None:
    """Offer the names of methods where one is given, in place; any other text stays valid."""
    named = properties.get("merge_method")
    if named and methods:
        kept = {key: value for key, value in named.items() if key not in ("type", "minLength", "anyOf")}
        others = named.get("anyOf", [{"type": "string", "minLength": 1}])
        properties["merge_method"] = {**kept, "anyOf": [{"enum": [*methods]}, *others]}


def _name_steps(schema: dict[str, Any], name: str, known: Sequence[str]) -> None:
    """Give what stands below a key a shape of its own, in place, in which the steps are those that are known."""
    shape = schema["$defs"]["GivenStep"]
    method = {key: value for key, value in shape["properties"]["method"].items() if key not in ("type", "minLength")}
    schema["$defs"][f"GivenStep-{name}"] = {**shape, "properties": {"method": {**method, "enum": [*known]}}}
    text = json.dumps(schema["properties"][name])
    schema["properties"][name] = json.loads(text.replace('"#/$defs/GivenStep"', f'"#/$defs/GivenStep-{name}"'))


def _make_schema(model: type[Value]) -> dict[str, Any]:
    """Return a model's schema with the texts below its fields, and those of what it is made of."""
    schema = model.model_json_schema()
    models = {each.__name__: each for each in Value.__subclasses__()}
    for name, shape in {model.__name__: schema, **schema["$defs"]}.items():
        if name in models:
            _describe(shape.get("properties", {}), models[name])
    return schema


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
