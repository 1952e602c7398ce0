"""Anchors under keys of one's own, as mergekit's users write them; a misspelt key stays an error."""

import pytest

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import parse_recipe, recipe_to_json

PLAIN = """merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3], parameters: {scale: 0.5}}]
  - sources: [{model: a, layer_range: [1, 4], parameters: {scale: 0.5}}]
"""
HELD = {
    "one": """const_tag: &M a
merge_method: passthrough
slices:
  - sources: [{model: *M, layer_range: [0, 3], parameters: &p {scale: &s 0.5}}]
  - sources: [{model: *M, layer_range: [1, 4], parameters: {<<: *p}}]
""",
    "several, below a list and a mapping": """my:
  models: [&M a, &N b]
  half: &h {scale: 0.5}
merge_method: passthrough
slices:
  - sources: [{model: *M, layer_range: [0, 3], parameters: *h}]
  - sources: [{model: *M, layer_range: [1, 4], parameters: {<<: [*h]}}]
""",
    "one that another uses": """first: &h {scale: 0.5}
second: &p
  <<: *h
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3], parameters: *p}]
  - sources: [{model: a, layer_range: [1, 4], parameters: *h}]
""",
}


@pytest.mark.parametrize("name", HELD)
def test_keys_that_hold_anchors_for_others_are_no_part_of_the_recipe(name: str) -> None:
    assert recipe_to_json(parse_recipe(HELD[name])) == recipe_to_json(parse_recipe(PLAIN))


@pytest.mark.parametrize(
    "text",
    [
        "const_tag: a\n" + PLAIN,
        "const_tag: &M a\n" + PLAIN,
        PLAIN.replace("a,", "&M a,", 1) + "const_tag: *M\n",
        "merge_metod: &M a\n" + PLAIN.replace("model: a", "model: *M"),
    ],
    ids=["no anchor", "an anchor that nothing uses", "an alias", "a misspelt key"],
)
def test_any_other_unknown_key_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown key"):
        parse_recipe(text)


def test_a_key_of_ones_own_below_the_top_is_an_error() -> None:
    with pytest.raises(RecipeError, match="unknown key 'mine'"):
        parse_recipe(PLAIN.replace("{model: a, layer", "{mine: &M a, model: *M, layer", 1))


def test_residual_weight_of_a_slice_is_a_number_that_does_nothing() -> None:
    text = PLAIN.replace("parameters: {scale: 0.5}}]", "parameters: {scale: 0.5}}]\n    residual_weight: 0.5", 1)
    found = parse_recipe(text)
    assert found.slices is not None
    assert [part.residual_weight for part in found.slices] == [0.5, None]
    with pytest.raises(RecipeError, match="'residual_weight' must be a number, not the text 'much'"):
        parse_recipe(text.replace("weight: 0.5", "weight: much"))
