"""Storage options of a recipe: where storage is, never a secret."""

import pytest
from recipe.test_faults import MODELS, say_fault

from mergemill.engine.recipe import parse_recipe, recipe_to_json

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


def test_options_are_plain_values_by_scheme() -> None:
    recipe = parse_recipe(LINEAR + "storage_options: {s3: {profile: team, anonymous: true}}\n", name="r.yml")
    assert recipe.storage == {"s3": {"profile": "team", "anonymous": True}}
    assert recipe_to_json(recipe)["storage_options"] == recipe.storage
    assert parse_recipe(LINEAR, name="r.yml").storage == {}


@pytest.mark.parametrize("name", ["key", "secret", "aws_secret_access_key", "token", "account_key", "password"])
def test_a_secret_is_refused_without_being_said(name: str) -> None:
    fault = say_fault(MODELS + f"storage_options: {{s3: {{{name}: hunter2}}}}\n")
    assert f"'{name}' is a secret, and a recipe is copied beside the output" in fault
    assert "hunter2" not in fault


def test_an_option_is_a_plain_value() -> None:
    assert "'profile' must be text, a number or true, not" in say_fault(
        MODELS + "storage_options: {s3: {profile: [a]}}\n"
    )
