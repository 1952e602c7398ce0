"""The canonical form: recipe to JSON to recipe, and the same JSON for equal recipes."""

import json
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import (
    Condition,
    GivenStep,
    Guard,
    ModelEntry,
    ModelRef,
    ModelRow,
    Module,
    Parameters,
    Recipe,
    Slice,
    Source,
    Token,
    Tokenizer,
    Tokens,
    ZeroRow,
    parse_recipe,
    recipe_to_json,
)
from mergemill.engine.recipe.vocabulary import Missing

names = st.text(alphabet="abz_.@+/:é😀 -\\\"'{}<|>", min_size=1, max_size=8).filter(str.strip)
numbers = st.integers(-(1 << 62), 1 << 62) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.one_of(st.booleans(), numbers, names)
gradients = st.one_of([st.lists(sort, min_size=1, max_size=4).map(tuple) for sort in (numbers, st.booleans(), names)])
filters = st.none() | names | st.just(r"re:layers\.\d+")
conditions = st.lists(st.builds(Condition, filter=filters, value=scalars | gradients), min_size=1, max_size=3)
parameters = st.dictionaries(names, st.one_of(scalars, gradients, conditions.map(tuple)), max_size=3).map(Parameters)
places = names.filter(lambda text: "://" not in text)
loras = st.builds(ModelRef, path=places, revision=st.none() | names)
refs = st.builds(ModelRef, path=places, revision=st.none() | names, lora=st.none() | loras)
entries = st.lists(
    st.builds(ModelEntry, model=refs, delta_base=st.none() | refs, parameters=parameters), min_size=1, max_size=2
).map(tuple)
sources = st.builds(Source, model=refs, layer_range=st.integers(0, 9).map(lambda at: (at, at + 3)))
slices = st.lists(
    st.builds(Slice, sources=st.lists(sources, min_size=1, max_size=2).map(tuple), base_model=st.none() | refs),
    min_size=1,
    max_size=2,
).map(tuple)
modules = st.dictionaries(
    names, st.builds(Module, models=entries) | st.builds(Module, slices=slices), min_size=1, max_size=2
)
rows = st.one_of(st.none(), refs, st.just(ZeroRow()), st.builds(ModelRow, model=refs, token_id=st.integers(0, 99)))
tokens = st.dictionaries(names, st.builds(Token, source=rows, force=st.booleans()), max_size=2).map(Tokens)
tokenizers = st.builds(
    Tokenizer,
    source=st.sampled_from(["union", "base"]) | refs.filter(lambda ref: str(ref) not in ("union", "base")),
    tokens=tokens,
    pad_to_multiple_of=st.none() | st.integers(1, 512),
    missing=st.none() | st.builds(Missing, method=names, k=st.none() | st.integers(1, 99)),
)
steps = st.builds(
    lambda method, given: GivenStep.model_validate({**given, "method": method}),
    names,
    parameters,
)
rest = {
    "coefficients": st.none() | steps,
    "post": st.none() | st.lists(steps, min_size=1, max_size=2).map(tuple),
    "guard": st.none()
    | st.builds(Guard, policy=st.sampled_from(["warn", "keep-base", "fail"]), growth=st.floats(1, 9)),
    "merge_method": names,
    "base_model": st.none() | refs,
    "parameters": parameters,
    "dtype": st.sampled_from([None, "float32", "bfloat16"]),
    "tokenizer": st.none() | tokenizers,
    "chat_template": st.sampled_from([None, "auto", "{{ messages }}\n"]),
}
recipes = st.one_of(
    st.builds(Recipe, models=entries, **rest),
    st.builds(Recipe, slices=slices, **rest),
    st.builds(Recipe, modules=modules, **rest),
)


@given(recipes)
@settings(deadline=None)
def test_recipe_to_json_to_recipe(recipe):
    stored = json.dumps(recipe_to_json(recipe))
    read = parse_recipe(stored)
    assert read == recipe
    assert Recipe.model_validate(json.loads(stored)) == recipe
    assert json.dumps(recipe_to_json(read)) == stored


@given(recipes)
@settings(max_examples=20, deadline=None)
def test_recipes_travel_to_other_processes(recipe):
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_the_canonical_form_is_exactly_this():
    text = "{models: [{model: {model: b, lora: c}}], parameters: {w: [0], a: 1}, merge_method: m, dtype: fp16}"
    assert recipe_to_json(parse_recipe(text)) == {
        "merge_method": "m",
        "models": [{"model": "b+c", "parameters": {}}],
        "parameters": {"a": 1, "w": [0]},
        "dtype": "float16",
    }


def test_a_boolean_is_not_a_number_in_equality():
    text = "{merge_method: m, models: [{model: a}], parameters: {t: %s}}"
    one, true = (parse_recipe(text % t) for t in (1, True))
    assert one != true


KEYS = [
    *Recipe.known_keys(),
    "model",
    "sources",
    "layer_range",
    "value",
    "filter",
    "t",
    "kind",
    "path",
    "lora",
    "x",
]
WORDS = ["union", "a+b", "re:(", "zero", ""]
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
)


@given(st.dictionaries(st.sampled_from(KEYS), trees, max_size=6))
@settings(max_examples=300, deadline=None)
def test_whatever_is_wrong_is_one_plain_line(tree):
    text = json.dumps({"merge_method": "m", **tree}, indent=1).replace("Infinity", ".inf").replace("NaN", ".nan")
    try:
        parse_recipe(text)
    except RecipeError as error:
        message = str(error)
        assert message.startswith("recipe.yml:")
        assert "\n" not in message
        assert not any(word in message for word in ("Input should", "pydantic", "valid dictionary", "Extra inputs"))
