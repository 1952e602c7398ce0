"""Which value a parameter has for one tensor and one model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan.sketches import config, find_settings, list_tensors, llama, make_recipe, plan_of, write_sketch

from mergemill.engine.errors import PlanError
from mergemill.engine.methods.catalogue import get_method
from mergemill.engine.plan.settings import Site, evaluate, resolve_settings
from mergemill.engine.recipe import Parameters

Q0 = "model.layers.0.self_attn.q_proj.weight"
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
LAYERS = 5


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        write_sketch(tmp_path / name, llama(layers=LAYERS), config=config(layers=LAYERS))


def linear(weight: Any, **more: Any) -> dict[str, Any]:
    """A recipe whose model `a` has that weight, and `b` 1."""
    models = [{"model": "a", "parameters": {"weight": weight}}, {"model": "b", "parameters": {"weight": 1}}]
    return {"merge_method": "linear", "models": models, **more}


def weights(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Return the first model's weight for every output tensor."""
    plan = plan_of(recipe)
    return {name: find_settings(plan, name)["weight"][0] for name in list_tensors(plan)}


def by_layer(found: Mapping[str, float]) -> list[float]:
    """Return what the layers' q_proj have."""
    return [found[Q0.replace("0", str(i))] for i in range(LAYERS)]


# ------------------------------------------------------------------------------------------------ precedence
LEVELS = ("source", "slice", "module", "recipe")


def nested(given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A recipe with parameters at any of `LEVELS`, for model `a`."""

    def at(level: str) -> dict[str, Any]:
        return {"parameters": dict(given[level])} if level in given else {}

    sources = [
        {"model": "base", "layer_range": [0, 5]},
        {"model": "a", "layer_range": [0, 5], **at("source")},
    ]
    module = {"slices": [{"sources": sources, **at("slice")}], **at("module")}
    return {"merge_method": "ties", "base_model": "base", "modules": {"default": module}, **at("recipe")}


@pytest.mark.parametrize("place", range(len(LEVELS)))
def test_the_nearest_level_gives_the_value(place: int) -> None:
    given = {level: {"weight": float(i)} for i, level in enumerate(LEVELS) if i >= place}
    assert find_settings(plan_of(nested(given)), Q0)["weight"] == (float(place),)


@pytest.mark.parametrize("place", range(1, len(LEVELS)))
def test_the_nearest_level_gives_what_is_not_per_model(place: int) -> None:
    given = {
        "source": {"weight": 1},
        **{level: {"lambda": float(i)} for i, level in enumerate(LEVELS) if i >= place},
    }
    given["source"] = {"weight": 1}
    assert find_settings(plan_of(nested(given)), Q0)["lambda"] == float(place)


def test_without_any_level_the_default_holds() -> None:
    found = find_settings(plan_of(nested({"recipe": {"weight": 1}})), Q0)
    assert found == {"weight": (1.0,), "density": (1.0,), "normalize": True, "lambda": 1.0, "rescale": False}


def test_conditions_of_which_none_matches_fall_through_to_the_next_level() -> None:
    nowhere = {"filter": "mlp", "value": 9}
    given = {"source": {"weight": [nowhere]}, "slice": {"weight": [nowhere]}, "recipe": {"weight": 3}}
    plan = plan_of(nested(given))
    assert find_settings(plan, Q0)["weight"] == (3.0,)
    assert find_settings(plan, "model.layers.0.mlp.up_proj.weight")["weight"] == (9.0,)


def test_the_first_condition_that_matches_holds() -> None:
    conditions = [
        {"filter": "self_attn.q", "value": 2},
        {"filter": "self_attn", "value": 3},
        {"filter": "*", "value": 4},
        {"value": 5},
    ]
    found = weights(linear(conditions))
    assert (found[Q0], found[Q0.replace("q_", "k_")], found[NORM]) == (2, 3, 4)


def test_filters_of_a_slice_see_the_name_in_the_output() -> None:
    part = {"sources": [{"model": "a", "layer_range": [3, 5]}]}
    part |= {"parameters": {"scale": [{"filter": "layers.0", "value": 7}]}}
    plan = plan_of({"merge_method": "passthrough", "slices": [part]})
    assert find_settings(plan, Q0)["scale"] == (7.0,)


def test_a_plain_filter_is_a_substring_and_never_a_pattern() -> None:
    found = weights(linear([{"filter": "layers.[01]", "value": 2}, {"filter": "1.self", "value": 3}, {"value": 4}]))
    assert by_layer(found) == [4, 3, 4, 4, 4]


def test_a_filter_after_re_is_searched_as_a_regular_expression() -> None:
    found = weights(
        linear([{"filter": r"re:layers\.[13]\.self", "value": 2}, {"filter": "re:^lm", "value": 3}, {"value": 4}])
    )
    assert by_layer(found) == [4, 2, 4, 2, 4]
    assert (found[HEAD], found[EMBEDDING]) == (3, 4)


# ------------------------------------------------------------------------------------------------- gradients
def test_a_gradient_runs_over_the_slice_and_is_at_its_start_outside_the_layers() -> None:
    found = weights(linear([1, 3, 2]))
    assert by_layer(found) == [1, 2, 3, 2.5, 2]
    assert (found[EMBEDDING], found[NORM], found[HEAD]) == (1, 1, 1)


def test_a_gradient_of_one_element_is_that_element_everywhere() -> None:
    assert set(weights(linear([0.25])).values()) == {0.25}


def test_each_slice_has_its_gradient_and_a_slice_of_one_layer_its_end() -> None:
    parts = [[0, 1], [1, 4], [4, 5]]
    slices = [{"sources": [{"model": "a", "layer_range": part, "parameters": {"scale": [2, 4]}}]} for part in parts]
    plan = plan_of({"merge_method": "passthrough", "slices": slices})
    found = [find_settings(plan, Q0.replace("0", str(i)))["scale"][0] for i in range(LAYERS)]
    assert found == [4, 2, 3, 4, 4]


def test_booleans_step_over_the_layers() -> None:
    recipe = linear(1, parameters={"normalize": [True, False]})
    plan = plan_of(recipe)
    found = [find_settings(plan, Q0.replace("0", str(i)))["normalize"] for i in range(LAYERS)]
    assert found == [True, True, True, True, False]


def test_a_gradient_inside_a_condition_runs_too() -> None:
    found = weights(linear([{"filter": "self_attn", "value": [1, 5]}, {"value": 7}]))
    assert (by_layer(found), found[NORM]) == ([1, 2, 3, 4, 5], 7)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_elements_and_meets_its_ends(gradient: list[float], t: float) -> None:
    at = {place: evaluate(tuple(gradient), Site("x", place, ())) for place in (0.0, t, 1.0)}
    assert (at[0.0], at[1.0]) == (gradient[0], gradient[-1])
    assert min(gradient) - 1e-9 <= at[t] <= max(gradient) + 1e-9


# ---------------------------------------------------------------------------------------------------- errors
def fails(recipe: Mapping[str, Any]) -> str:
    """Return the message with which the plan is refused; it is one line."""
    with pytest.raises(PlanError) as caught:
        plan_of(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_value_names_parameter_model_and_tensor() -> None:
    words = fails({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]})
    assert words.startswith(
        "recipe.yml: parameter 'weight' of model b has no value for tensor model.embed_tokens.weight"
    )


def test_conditions_that_leave_a_tensor_out_are_a_missing_value() -> None:
    words = fails(linear([{"filter": "mlp", "value": 1}, {"filter": "embed", "value": 1}]))
    assert "'weight' of model a has no value for tensor model.layers.0.input_layernorm.weight" in words


def test_a_missing_value_that_is_not_per_model_names_no_model() -> None:
    words = fails({"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}]})
    assert "parameter 't' has no value for tensor model.embed_tokens.weight" in words


@pytest.mark.parametrize("density", [1.5, -0.1, [0.5, 1.01], "2"])
def test_a_density_out_of_range_is_refused_with_its_range(density: Any) -> None:
    words = fails(nested({"source": {"weight": 1, "density": density}}))
    assert "parameter 'density' of model a for tensor" in words
    assert "it must be from 0 to 1" in words


@pytest.mark.parametrize("bad", [True, "much", "nan", "1e999"])
def test_what_is_no_number_is_refused(bad: Any) -> None:
    assert f"is {bad!r}; it must be a number" in fails(linear(bad))


@pytest.mark.parametrize(("number", "flag"), [(0, False), (1, True), (0.0, False), (1.0, True)])
def test_nought_and_one_are_booleans_as_well(number: float, flag: bool) -> None:
    assert find_settings(plan_of(linear(1, parameters={"normalize": number})), Q0)["normalize"] is flag


@pytest.mark.parametrize("bad", [2, 0.5, "yes", "1"])
def test_what_is_no_boolean_is_refused(bad: Any) -> None:
    assert f"is {bad!r}; it must be true or false" in fails(linear(1, parameters={"normalize": bad}))


def test_numbers_in_quotes_are_numbers() -> None:
    assert set(weights(linear("0.25")).values()) == {0.25}


def test_weights_that_sum_to_zero_are_refused_under_normalize_alone() -> None:
    assert "the weights -1, 1 sum to zero" in fails(linear(-1))
    assert set(weights(linear(-1, parameters={"normalize": False})).values()) == {-1}


def test_weights_that_sum_to_zero_in_one_layer_are_refused_with_its_name() -> None:
    assert "tensor model.layers.4.input_layernorm.weight: the weights -1, 1 sum to zero" in fails(linear([1, -1]))


def test_a_base_among_the_models_needs_no_weight_and_its_own_does_nothing() -> None:
    listed = [{"model": "base", "parameters": {"weight": 5}}, {"model": "a", "parameters": {"weight": 2}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": listed}
    assert find_settings(plan_of(recipe), Q0)["weight"] == (2.0,)
    assert find_settings(plan_of(recipe | {"models": [{"model": "base"}, listed[1]]}), Q0)["weight"] == (2.0,)


def test_a_parameter_that_the_method_does_not_take_is_a_warning() -> None:
    recipe = {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "b"}],
        "parameters": {"t": 0.5, "int8_mask": True},
    }
    assert plan_of(recipe).warnings == ("recipe.yml: slerp takes no parameter 'int8_mask'; it does nothing here",)


def test_int8_mask_is_no_warning_where_methods_of_mergekit_take_it() -> None:
    assert plan_of(nested({"recipe": {"weight": 1, "int8_mask": True}})).warnings == ()


def test_a_name_in_python_with_an_underscore_is_a_word_in_the_recipe() -> None:
    site = Site("x", 0.0, (Parameters({"lambda": 3.0, "weight": 1.0}),))
    assert resolve_settings(get_method("ties"), site, [("a", "x", Parameters())], where="r")["lambda"] == 3.0


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="unknown merge_method 'tees'; did you mean 'ties'"):
        plan_of(dict(make_recipe(linear(1)).model_dump(mode="json", exclude_none=True), merge_method="tees"))


def test_a_setting_for_all_models_beside_one_of_them_is_a_warning() -> None:
    recipe = linear(1.0)
    recipe["models"][0]["parameters"] = {"weight": 1.0, "normalize": False}
    assert plan_of(recipe).warnings == (
        "recipe.yml: linear has one 'normalize' for all models; beside a model it does nothing",
    )


def shifted(**parameters: Any) -> dict[str, Any]:
    """Slices that make layers 0, 1 of the output of layers 2, 3 of `a`, merged with those of `b`."""
    sources = [
        {"model": "a", "layer_range": [2, 4], **parameters},
        {"model": "b", "layer_range": [0, 2], "parameters": {"weight": 1}},
    ]
    return {"merge_method": "linear", "slices": [{"sources": sources}]}


CONDITIONS = [{"filter": "layers.2.", "value": 3}, {"value": 5}]


def test_a_filter_beside_a_model_matches_the_names_of_its_own_tensors_as_in_mergekit() -> None:
    found = weights(shifted(parameters={"weight": CONDITIONS}))
    assert (found[Q0], found[Q0.replace("0", "1")]) == (3, 5)


def test_a_shared_filter_matches_the_names_of_the_output() -> None:
    conditions = [{"filter": "layers.1.", "value": 3}, {"value": 5}]
    found = weights(shifted() | {"parameters": {"weight": conditions}})
    assert (found[Q0], found[Q0.replace("0", "1")]) == (5, 3)


def test_the_plan_tells_where_the_two_names_decide_differently() -> None:
    (warning,) = plan_of(shifted(parameters={"weight": CONDITIONS})).warnings
    assert "the filters of 'weight' beside a are matched with its own tensors: model.layers.2." in warning
    assert "in the output model.layers.0." in warning


@pytest.mark.parametrize("name", ["q_proj", "re:q_proj|k_proj", "layers.7.", "*"])
def test_the_plan_tells_nothing_where_they_decide_alike(name: str) -> None:
    weight = [{"filter": name, "value": 3}, {"value": 5}]
    assert plan_of(shifted(parameters={"weight": weight})).warnings == ()


def test_a_number_that_is_refused_is_told_with_all_its_digits() -> None:
    entry = {"model": "a", "parameters": {"weight": 1, "density": 1.0000001}}
    words = fails({"merge_method": "ties", "base_model": "base", "models": [entry]})
    assert "is 1.0000001; it must be from 0 to 1" in words
