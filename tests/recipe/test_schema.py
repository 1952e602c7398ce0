"""The JSON schema that editors complete from."""

import json

import pytest

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import Recipe, recipe_schema
from mergemill.engine.recipe.adapters import AdapterRecipe
from mergemill.engine.recipe.mixtures import Mixture


def test_the_schema_knows_every_key_and_describes_it():
    properties = recipe_schema()["properties"]
    assert sorted(properties) == sorted(Recipe.known_keys())
    assert all(described.get("description") for described in properties.values())


def test_the_schema_refuses_unknown_keys_everywhere():
    shapes = recipe_schema()["$defs"]
    closed = [name for name, shape in shapes.items() if shape.get("additionalProperties") is False]
    assert sorted(closed) == [
        "Condition",
        "Guard",
        "ImportanceOf",
        "Missing",
        "ModelEntry",
        "ModelRow",
        "Module",
        "Policy",
        "Slice",
        "Source",
        "Token",
        "Tokenizer",
        "TransposedWeights",
        "ZeroRow",
    ]
    assert recipe_schema()["additionalProperties"] is False


def test_the_schema_is_json_and_always_the_same():
    assert json.dumps(recipe_schema()) == json.dumps(recipe_schema())
    assert recipe_schema()["required"] == ["merge_method"]


@pytest.mark.parametrize(("of", "model"), [("mixture", Mixture), ("adapters", AdapterRecipe)])
def test_mixtures_and_documents_of_adapters_have_theirs(of, model):
    schema = recipe_schema(of=of)
    assert sorted(schema["properties"]) == sorted(set(model.known_keys()))
    assert all(described.get("description") for described in schema["properties"].values())
    assert schema["additionalProperties"] is False


def test_the_schema_of_a_mixture_checks_what_mergekit_moe_takes():
    jsonschema = pytest.importorskip("jsonschema")
    recipe = {"base_model": "a", "gate_mode": "random", "experts": [{"source_model": "a", "count": 8}]}
    jsonschema.validate(recipe, recipe_schema(of="mixture"))
    with pytest.raises(jsonschema.ValidationError, match="noise_std"):
        jsonschema.validate({**recipe, "experts": [{"source_model": "a", "noise_std": 1}]}, recipe_schema(of="mixture"))


def test_a_schema_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(RecipeError, match="no schema of 'stage'; there are those of recipe, mixture, adapters"):
        recipe_schema(of="stage")


def test_editors_are_offered_methods_and_those_of_the_steps_before_and_after():
    jsonschema = pytest.importorskip("jsonschema")
    schema = recipe_schema(["ties"], post=["svc"], coefficients=["lines"])
    assert recipe_schema(["ties"], of="adapters")["properties"]["merge_method"]["anyOf"][0] == {"enum": ["ties"]}
    recipe = {"merge_method": "mine", "models": [{"model": "a"}]}
    jsonschema.validate({**recipe, "post": [{"method": "svc", "alpha": 1.0}]}, schema)
    jsonschema.validate({**recipe, "coefficients": {"method": "lines"}, "post": None}, schema)
    for wrong in ({"post": [{"method": "lines"}]}, {"coefficients": {"method": "svc"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**recipe, **wrong}, schema)
