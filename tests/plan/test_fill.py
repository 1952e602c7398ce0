"""From stored tensors to the expression of one output tensor: what fits together, and what is refused."""

import json
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
    parse_header,
    plan_of,
    write_sketch,
)

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.values import Plan
from mergemill.engine.tensors.expressions import Agreed, Stored
from mergemill.engine.tensors.merged import Merged

Q = "model.layers.0.self_attn.q_proj.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
MASK = "model.layers.0.mask"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, changes: Sketch | None = None, *, without: tuple[str, ...] = (), tied: bool = False) -> None:
    """Write a Llama of one layer with other or fewer tensors."""
    tensors = {**llama(layers=1, tied=tied), **(changes or {})}
    held = {tensor: of for tensor, of in tensors.items() if tensor not in without}
    write_sketch(Path(name), held, config=config(layers=1, tied=tied))


def merge(*models: str, method: str = "linear", base: str | None = None, **more: Any) -> Plan:
    """Plan the merge of whole models."""
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": model} for model in models],
        **more,
    }
    if method != "passthrough":
        recipe["parameters"] = {"t": 0.5} if method == "slerp" else {"weight": 1}
    return plan_of(recipe | ({"base_model": base} if base else {}))


# ---------------------------------------------------------------------------------------- shapes and presence
def test_shapes_that_differ_are_refused_with_both(tmp_path: Path) -> None:
    write("a")
    write("b", {Q: ("BF16", (8, 4))})
    with pytest.raises(PlanError, match=r"q_proj.weight: a has shape \[8, 8\], b \[8, 4\]; shapes must match"):
        merge("a", "b")


def test_vocabularies_that_differ_are_refused_as_such() -> None:
    write("a")
    write("b", {EMBEDDING: ("BF16", (17, 8))})
    with pytest.raises(PlanError, match="models with equal vocabularies are needed"):
        merge("a", "b")


@pytest.mark.parametrize(("order", "larger"), [("ab", "b"), ("ba", "b")])
def test_the_token_that_one_model_has_more_is_named(order: str, larger: str) -> None:
    write("a")
    write("b", {EMBEDDING: ("BF16", (17, 8)), HEAD: ("BF16", (17, 8))})
    with pytest.raises(PlanError, match=r"equal vocabularies are needed, or 'tokenizer_source: union'$"):
        merge(*order)
    vocabulary = {f"t{i}": i for i in range(16)}
    Path("b/vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(PlanError, match=r"source: union'; no token of b has the rows from 16 on$"):
        merge(*order)
    Path("b/vocab.json").write_text(json.dumps(vocabulary | {"<|im_start|>": 16}))
    with pytest.raises(PlanError, match=rf"source: union'; {larger} has the rows from 16 on for '<\|im_start\|>'$"):
        merge(*order)


def test_a_tensor_that_some_models_lack_is_refused_with_their_names() -> None:
    write("a")
    write("b", without=(Q,))
    write("c", without=(Q,))
    with pytest.raises(PlanError, match=rf"tensor {Q} is in a but not in b, c"):
        merge("a", "b", "c")


def test_an_optional_buffer_merges_over_the_models_that_have_it() -> None:
    write("a", {INV_FREQ: ("F32", (4,))})
    write("b")
    write("c", {INV_FREQ: ("F32", (4,))})
    assert name_inputs(merge("a", "b", "c"))[INV_FREQ] == (f"a:{INV_FREQ}", f"c:{INV_FREQ}")


def test_an_optional_buffer_that_the_base_lacks_is_dropped_by_a_named_rule() -> None:
    write("base")
    write("a", {INV_FREQ: ("F32", (4,))})
    plan = merge("a", method="task_arithmetic", base="base")
    assert INV_FREQ not in list_tensors(plan)
    assert dict(plan.sources[0].dropped) == {"buffer that the base model does not store": 1}


def test_an_optional_buffer_that_only_the_base_has_is_not_made_of_nothing() -> None:
    """There is no task vector to add: the base's own is what a merge over those that have it gives."""
    write("base", {INV_FREQ: ("F32", (4,))})
    write("a")
    plan = merge("a", method="task_arithmetic", base="base")
    assert name_inputs(plan)[INV_FREQ] == (f"base:{INV_FREQ}",)
    assert isinstance(list_tensors(plan)[INV_FREQ].expression, Stored)


@pytest.mark.parametrize("has", ["a", "b"])
def test_slerp_copies_an_optional_buffer_that_one_model_stores(has: str) -> None:
    for name in "ab":
        write(name, {INV_FREQ: ("F32", (4,))} if name == has else {})
    plan = merge("a", "b", method="slerp", base="a")
    assert name_inputs(plan)[INV_FREQ] == (f"{has}:{INV_FREQ}",)
    assert isinstance(list_tensors(plan)[INV_FREQ].expression, Stored)


# ------------------------------------------------------------------------------------------------------ heads
def test_an_embedding_stands_for_the_head_of_a_tied_model() -> None:
    write("untied")
    write("tied", tied=True)
    assert name_inputs(merge("untied", "tied"))[HEAD] == (f"untied:{HEAD}", f"tied:{EMBEDDING}")


def test_an_embedding_stands_for_the_head_of_a_tied_base() -> None:
    write("base", tied=True)
    write("a")
    found = name_inputs(merge("a", method="ties", base="base"))
    assert found[HEAD] == (f"base:{EMBEDDING}", f"a:{HEAD}")
    assert found[EMBEDDING] == (f"base:{EMBEDDING}", f"a:{EMBEDDING}")


def test_models_that_are_all_tied_get_no_head() -> None:
    write("a", tied=True)
    write("b", tied=True)
    assert HEAD not in list_tensors(merge("a", "b"))


# ----------------------------------------------------------------------------------------------------- dtypes
def written(plan: Plan) -> dict[str, str]:
    """Return the dtype of every tensor that the shards' headers name."""
    return {name: entry["dtype"] for shard in plan.shards for name, entry in parse_header(shard.header).items()}


def test_without_a_dtype_each_tensor_gets_what_its_inputs_promote_to() -> None:
    write("a")
    write("b", {Q: ("F16", (8, 8)), EMBEDDING: ("F32", (16, 8))})
    found = written(merge("a", "b"))
    assert (found[Q], found[EMBEDDING], found[HEAD]) == ("F32", "F32", "BF16")


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"dtype": "float16"}, "F16"),
        ({"out_dtype": "float32"}, "F32"),
        ({"dtype": "float32", "out_dtype": "float16"}, "F16"),
        ({"dtype": "float64", "out_dtype": "bfloat16"}, "BF16"),
    ],
)
def test_out_dtype_is_written_else_dtype(settings: dict[str, str], dtype: str) -> None:
    write("a", {MASK: ("BOOL", (2, 2))})
    write("b", {MASK: ("BOOL", (2, 2))})
    assert set(written(merge("a", "b", **settings)).values()) == {dtype, "BOOL"}


@pytest.mark.parametrize(
    ("stored", "settings", "accumulated"),
    [
        ("BF16", {}, "F32"),
        ("F64", {}, "F64"),
        ("BF16", {"dtype": "float64"}, "F64"),
        ("F16", {"dtype": "bfloat16"}, "F32"),
    ],
)
def test_sums_are_float32_or_float64_where_an_input_or_the_recipe_says_so(
    stored: str, settings: dict[str, str], accumulated: str
) -> None:
    write("a", {Q: (stored, (8, 8))})
    write("b")
    expression = list_tensors(merge("a", "b", **settings))[Q].expression
    assert isinstance(expression, Merged)
    assert expression.dtype == accumulated


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL"])
@pytest.mark.parametrize(("method", "base"), [("linear", None), ("ties", "base"), ("slerp", "base")])
def test_integer_and_boolean_buffers_are_copied_where_all_agree(dtype: str, method: str, base: str | None) -> None:
    for name in ("base", "a"):
        write(name, {MASK: (dtype, (4,))})
    tensor = list_tensors(merge("base", "a", method=method, base=base))[MASK]
    assert isinstance(tensor.expression, Agreed)
    assert tensor.dtype == dtype
    assert len(list_stored(tensor)) == 2


@pytest.mark.parametrize("other", ["I32", "F32"])
def test_a_buffer_with_two_dtypes_is_refused(other: str) -> None:
    write("a", {MASK: ("I64", (4,))})
    write("b", {MASK: (other, (4,))})
    with pytest.raises(PlanError, match=rf"{MASK} is stored as I64, {other}; .* one dtype in all models"):
        merge("a", "b")


@pytest.mark.parametrize("dtype", ["F8_E4M3FNUZ", "C64"])
@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_a_dtype_that_cannot_be_merged_yet_is_refused_by_name(dtype: str, method: str) -> None:
    write("a", {MASK: (dtype, (4,))})
    with pytest.raises(PlanError, match=f"{MASK}: dtype {dtype} cannot be merged or copied yet"):
        merge("a", method=method)


def test_passthrough_without_scale_copies_and_with_one_computes() -> None:
    write("a")
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    scale = {"parameters": {"scale": [{"filter": "q_proj", "value": 0.5}]}}
    found = {name: type(t.expression) for name, t in list_tensors(plan_of(recipe | scale)).items()}
    assert [name for name, kind in found.items() if kind is Merged] == [Q]
    assert {kind for name, kind in found.items() if name != Q} == {Stored}


# ------------------------------------------------------------------------------------------- number of inputs
@pytest.mark.parametrize(
    ("method", "base", "models", "words"),
    [
        ("passthrough", None, "ab", "passthrough takes exactly 1 model; tensor .* has 2: a, b"),
        ("slerp", "a", "abc", "slerp takes exactly 2 models; tensor .* has 3: a, b, c"),
        ("slerp", "a", "a", "slerp takes exactly 2 models; tensor .* has 1: a"),
        ("ties", "a", "a", "ties takes at least 1 model beside the base model; tensor .* has 0: none"),
        ("slerp", None, "ab", "slerp needs 'base_model'"),
        ("dare_ties", None, "ab", "dare_ties needs 'base_model'"),
    ],
)
def test_a_wrong_number_of_models_is_refused_with_the_right_one(
    method: str, base: str | None, models: str, words: str
) -> None:
    for name in "abc":
        write(name)
    with pytest.raises(PlanError, match=words):
        merge(*models, method=method, base=base)


@pytest.mark.parametrize("method", ["slerp", "task_arithmetic"])
def test_a_slice_without_its_base_is_refused(method: str) -> None:
    for name in "abc":
        write(name)
    sources = [{"model": name, "layer_range": [0, 1]} for name in "ab"]
    recipe = {
        "merge_method": method,
        "base_model": "c",
        "slices": [{"sources": sources}],
        "parameters": {"weight": 1},
    }
    with pytest.raises(PlanError, match=f"{method} needs the base model c among the sources of the slice"):
        plan_of(recipe)
