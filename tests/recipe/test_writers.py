"""Recipes that are written: drawn layers, and the words of mergekit's older tools."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe import parse_recipe
from mergemill.engine.recipe.writers import Legacy, read_bakllama, shuffle_layers, write_legacy, write_text

MODELS = {"a": 8, "b": 8, "c": 8}


def list_layers(recipe: dict[str, Any]) -> list[tuple[str, int]]:
    sources = [part["sources"] for part in recipe["slices"]]
    assert all(len(each) == 1 for each in sources)
    return [(source["model"], layer) for (source,) in sources for layer in range(*source["layer_range"])]


def shuffle(
    layers: dict[str, int] = MODELS, weights: list[float] | None = None, *, seed: int = 0, full_random: bool = False
) -> dict[str, Any]:
    return shuffle_layers(layers, weights or [], seed=seed, full_random=full_random, dtype=None)


@given(st.integers(0, 2**32), st.lists(st.floats(0.1, 1), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_each_layer_is_that_of_one_model_at_its_place(seed: int, weights: list[float]) -> None:
    recipe = shuffle(weights=weights, seed=seed)
    assert [layer for _, layer in list_layers(recipe)] == list(range(8))
    models = [part["sources"][0]["model"] for part in recipe["slices"]]
    assert all(one != other for one, other in pairwise(models)), "neighbours are one slice"
    assert write_text(recipe) == write_text(shuffle(weights=weights, seed=seed))


def test_models_are_drawn_by_their_weights() -> None:
    drawn = [model for seed in range(400) for model, _ in list_layers(shuffle(weights=[1, 3, 0], seed=seed))]
    assert 0.22 < drawn.count("a") / len(drawn) < 0.28
    assert drawn.count("c") == 0


@given(st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_full_shuffle_takes_each_model_s_share_of_all_its_layers_once(seed: int) -> None:
    layers = list_layers(shuffle({"a": 7, "b": 4}, [0.5, 0.75], seed=seed, full_random=True))
    assert sorted(model for model, _ in layers) == ["a"] * 4 + ["b"] * 3
    assert len(set(layers)) == 7


def test_a_full_shuffle_reaches_every_layer() -> None:
    seen = {layer for seed in range(60) for layer in list_layers(shuffle({"a": 7}, [0.5], seed=seed, full_random=True))}
    assert seen == {("a", layer) for layer in range(7)}


@pytest.mark.parametrize(
    ("layers", "weights", "full_random", "fault"),
    [
        (MODELS, [1.0], False, "3 models and 1 weights; there must be as many, or no weights"),
        (MODELS, [1.0, -1.0, 1.0], False, "weights must be 0 or more, and not all 0"),
        (MODELS, [0.0, 0.0, 0.0], False, "weights must be 0 or more, and not all 0"),
        ({"a": 3, "b": 4}, [], False, "the models have different numbers of layers: a 3, b 4; --full-random"),
        ({"a": 4}, [2.0], True, "a has 4 layers, and its weight 2 asks for 8 different ones"),
        ({"a": 4}, [0.01], True, "the weights leave no layer; give larger ones"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    layers: dict[str, int], weights: list[float], full_random: bool, fault: str
) -> None:
    with pytest.raises(RecipeError, match=fault):
        shuffle(layers, weights, full_random=full_random)


def test_a_file_of_bakllama_means_slices_with_scaled_mlps_and_empty_ones_at_the_ends(tmp_path: Path) -> None:
    file = tmp_path / "stack.yml"
    file.write_text(
        "layer_slices:\n- {model: a, start: 0, end: 3, scale: 0.5}\n- {model: b, start: 1, end: 4}\n"
        "embedding_source: c\nlm_head_source: a\n"
    )
    assert yaml.safe_load(write_text(read_bakllama(str(file)))) == {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "c", "layer_range": [0, 0]}]},
            {
                "sources": [
                    {
                        "model": "a",
                        "layer_range": [0, 3],
                        "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]},
                    }
                ]
            },
            {"sources": [{"model": "b", "layer_range": [1, 4]}]},
            {"sources": [{"model": "a", "layer_range": [0, 0]}]},
        ],
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("layer_slices: []\n", "stack.yml:1: 'layer_slices' is an empty list"),
        ("layer_slices:\n- {model: a, start: 0}\n", "stack.yml:2: a layer slice needs the key 'end'"),
        ("layer_slices:\n- {model: a, start: 0, end: 2}\nhead: b\n", "stack.yml:3: unknown key 'head'"),
        ("layer_slices:\n- {model: a, start: 2, end: 2}\n", "'layer_range' is .2, 2. and must be"),
    ],
)
def test_a_wrong_file_of_bakllama_is_told_with_its_line(text: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "stack.yml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=fault):
        write_text(read_bakllama(str(file)))


def test_legacy_words_are_the_recipe_that_they_mean() -> None:
    asked = Legacy(["a", "b"], "ties", base="c", weights=[0.3], densities=[0.5, 0.6], normalize=False, dtype="bfloat16")
    recipe = parse_recipe(write_text(write_legacy(asked)))
    assert (recipe.merge_method, str(recipe.base_model), recipe.dtype) == ("ties", "c", "bfloat16")
    assert [dict(entry.parameters) for entry in recipe.models or ()] == [
        {"weight": 0.3, "density": 0.5},
        {"weight": 0.3, "density": 0.6},
    ]
    assert dict(recipe.parameters) == {"normalize": False}


def test_the_weight_of_a_legacy_slerp_is_its_t() -> None:
    recipe = write_legacy(Legacy(["b"], "slerp", base="a", weights=[0.3]))
    assert recipe == {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": 0.3},
    }


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (Legacy(["a", "b", "c"], "ties", weights=[1.0, 2.0]), "3 models and 2 of --weight; one serves all, else one"),
        (Legacy(["a"], "ties", densities=[1.0, 2.0]), "1 models and 2 of --density; one serves all, else one a model"),
        (Legacy(["a", "b", "c"], "slerp", weights=[1.0]), "slerp takes two models, the base among them, and one"),
        (Legacy(["a", "b"], "slerp"), "slerp takes two models, the base among them, and one --weight"),
    ],
)
def test_legacy_words_that_mean_nothing_are_refused(asked: Legacy, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        write_legacy(asked)
