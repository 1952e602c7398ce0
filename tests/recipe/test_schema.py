"""The JSON schema that editors complete from."""

import json

from mergemill.engine.recipe import Recipe, recipe_schema


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
        "ModelEntry",
        "ModelRow",
        "Module",
        "Policy",
        "Slice",
        "Source",
        "Token",
        "Tokenizer",
        "ZeroRow",
    ]
    assert recipe_schema()["additionalProperties"] is False


def test_the_schema_is_json_and_always_the_same():
    assert json.dumps(recipe_schema()) == json.dumps(recipe_schema())
    assert recipe_schema()["required"] == ["merge_method"]
