"""Steps around a method and task vectors with a base of their own: what the plan makes of them, and refuses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from plan.sketches import (
    EMBEDDING,
    HEAD,
    Sketch,
    config,
    list_stored,
    list_tensors,
    llama,
    name_inputs,
    plan_of,
    write_sketch,
)

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.values import Plan, SourceUse
from mergemill.engine.tensors.expressions import Agreed, Stored
from mergemill.engine.tensors.merged import Difference, Merged

LAYERS = 3
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
IDS = "model.layers.0.self_attn.position_ids"
TASKS: Mapping[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 1},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(
    *names: str,
    changes: Sketch | None = None,
    without: tuple[str, ...] = (),
    tied: bool = False,
    layers: int = LAYERS,
    dtype: str = "BF16",
) -> None:
    """Write Llamas with other or fewer tensors."""
    tensors = {**llama(layers=layers, tied=tied, dtype=dtype), **(changes or {})}
    held = {name: of for name, of in tensors.items() if name not in without}
    for name in names:
        write_sketch(Path(name), held, config=config(layers=layers, tied=tied))


def refuse(recipe: Mapping[str, Any]) -> str:
    """Return the one line with which a recipe is refused."""
    with pytest.raises(PlanError) as caught:
        plan_of(recipe)
    return str(caught.value)


def tasks(**changes: Any) -> dict[str, Any]:
    """Return the recipe of task arithmetic over a and b with other keys; None takes one away."""
    return {key: value for key, value in {**TASKS, **changes}.items() if value is not None}


def chat(model: str = "a", delta_base: str | None = "old", **more: Any) -> dict[str, Any]:
    """Return a recipe that adds to base what `model` has more than `delta_base`."""
    return tasks(models=[{"model": model, **({"delta_base": delta_base} if delta_base else {})}], **more)


def source(model: str, first: int, last: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, last], **more}


def merged(plan: Plan, tensor: str) -> Merged:
    """Return the expression of a merged tensor."""
    expression = list_tensors(plan)[tensor].expression
    assert isinstance(expression, Merged)
    return expression


def use_of(plan: Plan, model: str) -> SourceUse:
    (found,) = [use for use in plan.sources if use.model == model]
    return found


# -------------------------------------------------------------------------------------------- steps refused
@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        (
            {"coefficients": {"method": "line", "alpha": 1, "beta": 1}},
            "unknown method of coefficients 'line'; did you mean 'lines'?",
        ),
        ({"coefficients": {"method": "xyz"}}, "unknown method of coefficients 'xyz'; there are lines, metagpt"),
        ({"post": [{"method": "svd"}]}, "unknown step after a merge 'svd'; did you mean 'svc'?"),
        (
            {"coefficients": {"method": "lines", "alhpa": 1, "beta": 1}},
            "recipe.yml: coefficients: lines takes no parameter 'alhpa'; did you mean 'alpha'?",
        ),
        (
            {"coefficients": {"method": "lines", "alpha": 1, "beta": 1, "scale": 2}},
            "recipe.yml: coefficients: lines takes no parameter 'scale'; it takes alpha, beta",
        ),
        (
            {"coefficients": {"method": "metagpt", "alpha": 1}},
            "recipe.yml: coefficients: metagpt takes no parameter 'alpha'; it takes none",
        ),
        (
            {"post": [{"method": "svc"}, {"method": "svc", "apha": 1}]},
            "recipe.yml: post: svc takes no parameter 'apha'; did you mean 'alpha'?",
        ),
        (
            {"coefficients": {"method": "lines", "beta": 1}},
            f"recipe.yml: coefficients: parameter 'alpha' has no value for tensor {EMBEDDING}; "
            "set it beside its method",
        ),
        (
            {"coefficients": {"method": "lines", "alpha": [{"filter": "embed", "value": 1}], "beta": 1}},
            "recipe.yml: coefficients: parameter 'alpha' has no value for tensor "
            "model.layers.0.input_layernorm.weight; set it beside its method",
        ),
        (
            {"coefficients": {"method": "lines", "alpha": "much", "beta": 1}},
            f"recipe.yml: coefficients: parameter 'alpha' for tensor {EMBEDDING} is 'much'; it must be a number",
        ),
        (
            {"post": [{"method": "svc", "alpha": True}]},
            f"recipe.yml: post: parameter 'alpha' for tensor {EMBEDDING} is True; it must be a number",
        ),
        (
            {"post": [{"method": "svc", "alpha": -1}]},
            f"recipe.yml: post: parameter 'alpha' for tensor {EMBEDDING} is -1; it must be at least 0",
        ),
    ],
)
def test_a_wrong_step_is_refused_in_one_line(steps: dict[str, Any], fault: str) -> None:
    write("base", "a", "b")
    assert refuse(tasks(**steps)) == fault


LINES = {"method": "lines", "alpha": 1, "beta": 1}


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        (
            {"merge_method": "linear", "base_model": None, "coefficients": LINES},
            "recipe.yml: coefficients need task vectors, which linear does not take; "
            "leave coefficients out, or choose a method with a base model",
        ),
        (
            {"merge_method": "linear", "base_model": None, "post": [{"method": "svc"}]},
            "recipe.yml: post need task vectors, which linear does not take; "
            "leave post out, or choose a method with a base model",
        ),
        (
            {"merge_method": "slerp", "models": [{"model": "a"}], "post": [{"method": "svc"}]},
            "recipe.yml: post need task vectors, which slerp does not take; "
            "leave post out, or choose a method with a base model",
        ),
        (
            {"merge_method": "multislerp", "base_model": None, "coefficients": LINES},
            "recipe.yml: coefficients need task vectors, which multislerp does not take without a base model; "
            "leave coefficients out, or name a base_model",
        ),
    ],
)
def test_a_step_of_a_method_without_task_vectors_is_refused(recipe: dict[str, Any], fault: str) -> None:
    write("base", "a", "b")
    assert refuse(tasks(**recipe)) == fault


def test_an_optional_base_may_be_that_of_each_slice() -> None:
    write("base", "a", "b")
    slices = [
        {"sources": [source(own, i, i + 1), source("b", i, i + 1)], "base_model": own}
        for i, own in enumerate(["base", "a", "base"])
    ]
    recipe = tasks(merge_method="multislerp", base_model=None, models=None, slices=slices, coefficients=LINES)
    assert merged(plan_of(recipe), Q).factors == (1.0,)
    del slices[1]["base_model"]
    assert "which multislerp does not take without a base model" in refuse(recipe)


# ------------------------------------------------------------------------------------------ delta_base refused
@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({"merge_method": "linear", "base_model": None}, "linear"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "slerp"),
        ({"merge_method": "passthrough", "base_model": None, "parameters": None}, "passthrough"),
        ({"merge_method": "multislerp", "base_model": None}, "multislerp"),
    ],
)
def test_a_delta_base_without_a_task_vector_is_refused(recipe: dict[str, Any], method: str) -> None:
    write("base", "a", "old")
    fault = f"recipe.yml: {method} takes no task vector of a here; delta_base is for methods with a base model"
    assert refuse(chat(**recipe)) == fault


def test_a_delta_base_of_the_base_itself_is_refused() -> None:
    write("base", "a", "old")
    models = [{"model": "base", "delta_base": "old"}, {"model": "a"}]
    assert (
        refuse(tasks(models=models)) == "recipe.yml: the base model base has no task vector; leave its delta_base out"
    )


def test_a_tensor_that_the_delta_base_lacks_is_refused() -> None:
    write("base", "a")
    write("old", without=(Q,))
    assert refuse(chat()) == f"recipe.yml: tensor {Q} is in a but not in its delta_base old"


def test_a_tensor_that_only_the_delta_base_has_is_refused() -> None:
    write("base", "a")
    write("old", changes={"model.layers.0.self_attn.q_proj.bias": ("BF16", (8,))})
    fault = "old: tensor model.layers.0.self_attn.q_proj.bias would be lost: nothing merges, copies or drops it"
    assert refuse(chat()) == fault


@pytest.mark.parametrize(("dtype", "shape"), [("BF16", (8, 4)), ("I64", (8, 8))])
def test_a_delta_base_of_another_shape_or_kind_is_refused_with_both(dtype: str, shape: tuple[int, ...]) -> None:
    write("base", "a")
    write("old", changes={Q: (dtype, shape)})
    assert refuse(chat()) == (
        f"recipe.yml: tensor {Q}: a has shape [8, 8], its delta_base old {list(shape)} as {dtype}; "
        f"a task vector needs two floating tensors of one shape"
    )


def test_a_delta_base_with_another_number_of_layers_is_refused() -> None:
    write("base", "a")
    write("old", layers=2)
    assert refuse(chat()) == (
        "recipe.yml: the models have different numbers of layers in 'model.layers': a has 3, old has 2, base has 3; "
        "say with 'slices' which layers go together"
    )


def test_a_slice_beyond_the_layers_of_the_delta_base_is_refused() -> None:
    write("base", "a")
    write("old", layers=2)
    slices = [{"sources": [source("base", 0, 3), source("a", 0, 3, delta_base="old")]}]
    fault = "recipe.yml: layer_range [0, 3] of old: it has 2 layers, 0 to 1"
    assert refuse(tasks(models=None, slices=slices)) == fault


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({"merge_method": "linear", "base_model": None}, "linear"),
        ({"merge_method": "multislerp", "base_model": None}, "multislerp"),
        (
            {"merge_method": "passthrough", "base_model": None, "models": [{"model": "a"}], "parameters": {"scale": 2}},
            "passthrough",
        ),
    ],
)
def test_keeping_a_base_that_is_not_there_is_refused(recipe: dict[str, Any], method: str) -> None:
    write("base", "a", "b")
    assert refuse(tasks(guard={"policy": "keep-base"}, **recipe)) == (
        f"recipe.yml: guard: keep-base needs a base model, which {method} does not have here; choose warn or fail"
    )


def test_where_everything_is_copied_there_is_nothing_to_guard() -> None:
    write("a")
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}], "guard": {"policy": "keep-base"}}
    assert {tensor.most_growth for tensor in list_tensors(plan_of(recipe)).values()} == {None}


# ------------------------------------------------------------------------------------------ what the plan says
def test_the_vector_of_a_delta_base_is_a_difference_and_the_others_are_not() -> None:
    write("base", "a", "b", "old")
    plan = plan_of(tasks(models=[{"model": "a", "delta_base": "old"}, {"model": "b"}]))
    expression = merged(plan, Q)
    assert [type(each) for each in expression.inputs] == [Stored, Difference, Stored]
    assert expression.has_base
    assert name_inputs(plan)[Q] == (f"base:{Q}", f"a:{Q}", f"old:{Q}", f"b:{Q}")
    assert {use.merged for use in plan.sources} == {use_of(plan, "old").tensors}
    assert dict(use_of(plan, "old").dropped) == {}
    assert {pin.url.split("/")[-2] for pin in plan.pins} == {"base", "a", "b", "old"}
    assert use_of(plan, "old").read_bytes == use_of(plan, "a").read_bytes


def test_a_delta_base_that_is_the_base_model_changes_no_expression() -> None:
    write("base", "a")
    plain, named = plan_of(chat(delta_base=None)), plan_of(chat(delta_base="base"))
    assert {name: tensor.expression for name, tensor in list_tensors(named).items()} == {
        name: tensor.expression for name, tensor in list_tensors(plain).items()
    }
    assert named.sources == plain.sources


def test_a_delta_base_may_be_one_of_the_models() -> None:
    write("base", "a", "b")
    plan = plan_of(tasks(models=[{"model": "a", "delta_base": "b"}, {"model": "b"}]))
    assert name_inputs(plan)[Q] == (f"base:{Q}", f"a:{Q}", f"b:{Q}", f"b:{Q}")
    assert use_of(plan, "b").read_bytes == use_of(plan, "a").read_bytes  # once each


def test_the_embedding_stands_for_the_head_of_a_tied_delta_base() -> None:
    write("base", "a")
    write("old", tied=True)
    plan = plan_of(chat())
    assert name_inputs(plan)[HEAD] == (f"base:{HEAD}", f"a:{HEAD}", f"old:{EMBEDDING}")
    assert name_inputs(plan)[EMBEDDING][-1] == f"old:{EMBEDDING}"


def test_a_delta_base_with_a_head_gives_its_head() -> None:
    write("base", "a", tied=True)
    write("old")
    assert name_inputs(plan_of(chat()))[HEAD] == (f"base:{EMBEDDING}", f"a:{EMBEDDING}", f"old:{HEAD}")


def test_slices_take_the_same_layers_of_model_and_delta_base() -> None:
    write("base", "a", "old")
    slices = [
        {"sources": [source("base", 0, 2), source("a", 1, 3, delta_base="old")]},
        {"sources": [source("base", 2, 3), source("a", 0, 1)]},
    ]
    plan = plan_of(tasks(models=None, slices=slices))
    found = name_inputs(plan)
    other = Q.replace("0", "1")
    assert found[Q] == (f"base:{Q}", f"a:{other}", f"old:{other}")
    assert found[Q.replace("0", "2")] == (f"base:{Q.replace('0', '2')}", f"a:{Q}")
    assert found[EMBEDDING] == (f"base:{EMBEDDING}", f"a:{EMBEDDING}", f"old:{EMBEDDING}")
    assert found[NORM] == (f"base:{NORM}", f"a:{NORM}")
    assert dict(use_of(plan, "old").dropped) == {
        "layer outside every slice": 9,
        "after the layers, which come from the last slice": 2,
    }


def test_buffers_of_a_delta_base_are_dropped_by_a_named_rule() -> None:
    write("base", "a", "old", changes={IDS: ("I64", (4,))})
    plan = plan_of(chat())
    assert isinstance(list_tensors(plan)[IDS].expression, Agreed)
    assert name_inputs(plan)[IDS] == (f"a:{IDS}", f"base:{IDS}")
    assert dict(use_of(plan, "old").dropped) == {"of a delta_base, where no task vector is taken": 1}


def test_an_optional_buffer_that_only_the_delta_base_stores_is_dropped() -> None:
    write("base", "a")
    write("old", changes={INV_FREQ: ("F32", (4,))})
    plan = plan_of(chat())
    assert INV_FREQ not in list_tensors(plan)
    assert dict(use_of(plan, "old").dropped) == {"of a delta_base, where no task vector is taken": 1}


def test_sums_are_float64_where_the_delta_base_is() -> None:
    write("base", "a")
    write("old", dtype="F64")
    plan = plan_of(chat())
    assert merged(plan, Q).dtype == "F64"
    assert list_tensors(plan)[Q].dtype == "BF16", "written is what base and models promote to"


# ---------------------------------------------------------------------------------------------- coefficients
def test_lines_grow_with_the_layer_and_are_alpha_before_and_all_after() -> None:
    write("base", "a", "b")
    plan = plan_of(tasks(coefficients={"method": "lines", "alpha": 0.25, "beta": 0.5}))
    found = {name: merged(plan, name).factors for name in (EMBEDDING, NORM, HEAD)}
    assert found == {EMBEDDING: (0.25, 0.25), NORM: (0.75, 0.75), HEAD: (0.75, 0.75)}
    layers = [merged(plan, Q.replace("0", str(i))).factors for i in range(LAYERS)]
    assert layers == [(0.25, 0.25), (0.5, 0.5), (0.75, 0.75)]
    assert plan.scaling is None


def test_lines_count_the_layers_of_the_output_over_all_slices() -> None:
    write("base", "a")
    slices = [
        {"sources": [source("base", 0, 2), source("a", 0, 2)]},
        {"sources": [source("base", 0, 3), source("a", 0, 3)]},
    ]
    plan = plan_of(tasks(models=None, slices=slices, coefficients={"method": "lines", "alpha": 0, "beta": 1}))
    factors = [merged(plan, Q.replace("0", str(i))).factors for i in range(5)]
    assert factors == [(0.0,), (0.25,), (0.5,), (0.75,), (1.0,)]


def test_one_layer_alone_is_the_first() -> None:
    write("base", "a", layers=1)
    plan = plan_of(chat(delta_base=None, coefficients={"method": "lines", "alpha": 0.25, "beta": 0.5}))
    assert merged(plan, Q).factors == (0.25,)


def test_settings_of_a_step_may_have_conditions() -> None:
    write("base", "a", "b")
    alpha = [{"filter": "self_attn", "value": 0.5}, {"value": 2}]
    plan = plan_of(tasks(coefficients={"method": "lines", "alpha": alpha, "beta": 0}))
    assert (merged(plan, Q).factors, merged(plan, NORM).factors) == ((0.5, 0.5), (2.0, 2.0))


def test_metagpt_numbers_the_task_vectors_in_the_recipes_order() -> None:
    write("base", "a", "b", "old")
    models = [{"model": "b"}, {"model": "base"}, {"model": "a", "delta_base": "old"}, {"model": "a"}]
    plan = plan_of(tasks(models=models, coefficients={"method": "metagpt"}))
    assert plan.scaling is not None
    assert plan.scaling.vectors == ("b", "a", "a")
    assert merged(plan, Q).vectors == (0, 1, 2)
    assert merged(plan, Q).factors == ()


def test_a_model_has_one_task_vector_over_all_slices_and_as_many_as_it_has_sources_in_one() -> None:
    write("base", "a", "b")
    slices = [
        {"sources": [source("b", 0, 1), source("base", 0, 1), source("a", 0, 1), source("a", 1, 2)]},
        {"sources": [source("a", 1, 2), source("base", 1, 2), source("b", 1, 2)]},
    ]
    plan = plan_of(tasks(models=None, slices=slices, coefficients={"method": "metagpt"}))
    assert plan.scaling is not None
    assert plan.scaling.vectors == ("b", "a", "a")
    assert merged(plan, Q).vectors == (0, 1, 2)
    assert merged(plan, Q.replace("0", "1")).vectors == (1, 0)


def test_squares_and_what_follows() -> None:
    write("base", "a", "b")
    scaling = plan_of(tasks(coefficients={"method": "metagpt"})).scaling
    assert scaling is not None
    assert scaling.find_factors([3.0, 1.0]) == (0.75, 0.25)
    assert scaling.find_factors([0.0, 0.0]) == (0.5, 0.5)


# ------------------------------------------------------------------------------------------- steps and guards
def test_a_step_and_its_settings_are_in_the_digest() -> None:
    write("base", "a", "b")
    plain = plan_of(tasks())
    plans = [plan_of(tasks(post=[{"method": "svc", "alpha": alpha}])) for alpha in (1, 0.5)]
    assert merged(plans[0], Q).kernel.name == "task_arithmetic, then svc(alpha=1.0)"
    assert len({plan.digest for plan in (plain, *plans)}) == 3


@pytest.mark.parametrize(
    "step",
    [
        {"coefficients": {"method": "lines", "alpha": 1, "beta": 0}},
        {"coefficients": {"method": "metagpt"}},
        {"guard": {"policy": "fail"}},
        {"guard": {"policy": "warn", "growth": 9}},
        {"guard": {"policy": "keep-base"}},
        {"models": [{"model": "a", "delta_base": "b"}, {"model": "b"}]},
    ],
)
def test_every_step_is_in_the_digest(step: dict[str, Any]) -> None:
    write("base", "a", "b")
    assert plan_of(tasks(**step)).digest != plan_of(tasks()).digest


@pytest.mark.parametrize(("method", "based"), [("task_arithmetic", True), ("slerp", False)])
def test_keep_base_is_for_every_merged_tensor_and_for_no_copied_one(method: str, based: bool) -> None:
    write("base", "a", changes={IDS: ("I64", (4,))})
    settings = {"weight": 1} if based else {"t": 0.5}
    recipe = chat(delta_base=None, merge_method=method, parameters=settings, guard={"policy": "keep-base", "growth": 3})
    tensors = list_tensors(plan_of(recipe))
    assert tensors.pop(IDS).most_growth is None
    assert {tensor.most_growth for tensor in tensors.values()} == {3.0}
    assert all("/base/" in list_stored(tensor)[0].pin.url for tensor in tensors.values()), "what is kept comes first"


@pytest.mark.parametrize("policy", ["warn", "fail"])
def test_other_policies_change_no_tensor(policy: str) -> None:
    write("base", "a", "b")
    tensors = list_tensors(plan_of(tasks(guard={"policy": policy})))
    assert {tensor.most_growth for tensor in tensors.values()} == {None}
    assert plan_of(tasks()).guard.policy == "warn"
