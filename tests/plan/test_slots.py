"""Which tensors of which models make which tensor of the output."""

from pathlib import Path
from typing import Any

import pytest
from plan.sketches import (
    EMBEDDING,
    HEAD,
    config,
    llama,
    name_inputs,
    plan_of,
    read_json,
    write_sketch,
)

from mergemill.engine.errors import PlanError
from mergemill.engine.plan.values import Plan

WEIGHT = {"parameters": {"weight": 1}}
NORM = "model.norm.weight"


def q(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        write_sketch(tmp_path / name, llama(), config=config())


def source(model: str, first: int, last: int) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, last]}


def stack(*sources: dict[str, Any], method: str = "passthrough", **more: Any) -> Plan:
    """Plan a recipe with one slice a source."""
    return plan_of({"merge_method": method, "slices": [{"sources": [each]} for each in sources], **more})


def test_models_merge_tensor_by_tensor_in_the_order_of_the_recipe() -> None:
    entries = [{"model": "b"}, {"model": "a"}]
    found = name_inputs(plan_of({"merge_method": "linear", "models": entries, "parameters": {"weight": 1}}))
    assert found == {name: (f"b:{name}", f"a:{name}") for name in llama()}


def test_a_base_that_is_not_listed_joins_with_all_its_layers() -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}]}
    found = name_inputs(plan_of(recipe | {"parameters": {"weight": 1}}))
    assert found == {name: (f"base:{name}", f"a:{name}") for name in llama()}


def test_an_unlisted_base_joins_methods_without_a_base_as_a_model() -> None:
    recipe = {"merge_method": "linear", "base_model": "base", "models": [{"model": "a"}]}
    assert name_inputs(plan_of(recipe | {"parameters": {"weight": 1}}))[q(1)] == (f"a:{q(1)}", f"base:{q(1)}")


def test_slerp_begins_at_its_base_wherever_that_is_listed() -> None:
    recipe = {"merge_method": "slerp", "base_model": "b", "models": [{"model": "a"}, {"model": "b"}]}
    assert name_inputs(plan_of(recipe | {"parameters": {"t": 0.5}}))[q(0)] == (f"b:{q(0)}", f"a:{q(0)}")


def test_slices_are_renumbered_one_after_the_other() -> None:
    plan = stack(source("a", 0, 2), source("b", 1, 3), source("a", 2, 3))
    found = name_inputs(plan)
    wanted = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert [found[q(i)] for i in range(5)] == [(f"{model}:{q(layer)}",) for model, layer in wanted]
    assert q(5) not in found
    assert len(found) == 5 * 9 + 3
    assert read_json(plan, "config.json")["num_hidden_layers"] == 5


def test_embeddings_come_from_the_first_slice_and_norm_and_head_from_the_last() -> None:
    found = name_inputs(stack(source("a", 0, 2), source("b", 0, 1), source("base", 2, 3)))
    assert (found[EMBEDDING], found[NORM], found[HEAD]) == (
        (f"a:{EMBEDDING}",),
        (f"base:{NORM}",),
        (f"base:{HEAD}",),
    )


def test_the_same_model_twice_in_a_slice_merges_two_of_its_layers() -> None:
    sources = [source("a", 0, 2), source("a", 1, 3)]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources, "parameters": {"weight": 1}}]}
    found = name_inputs(plan_of(recipe))
    assert found[q(0)] == (f"a:{q(0)}", f"a:{q(1)}")
    assert found[q(1)] == (f"a:{q(1)}", f"a:{q(2)}")


def test_slerp_of_a_model_with_itself_takes_both_layers() -> None:
    sources = [source("a", 0, 2), source("a", 1, 3)]
    recipe = {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [{"sources": sources}],
        "parameters": {"t": 0.5},
    }
    assert name_inputs(plan_of(recipe))[q(0)] == (f"a:{q(0)}", f"a:{q(1)}")


def test_a_base_twice_in_a_slice_is_refused_since_either_could_be_meant() -> None:
    sources = [source("base", 0, 2), source("base", 1, 3), source("a", 0, 2)]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 1}}
    with pytest.raises(PlanError, match=r"base model base is 2 of the sources .* model\.embed_tokens"):
        plan_of(recipe | {"slices": [{"sources": sources}]})


def test_a_slice_may_have_a_base_of_its_own() -> None:
    slices = [
        {"sources": [source("a", 0, 2), source("base", 0, 2)]},
        {"sources": [source("a", 2, 3), source("b", 2, 3)], "base_model": "b"},
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": slices,
        "parameters": {"weight": 1},
    }
    found = name_inputs(plan_of(recipe))
    assert (found[q(1)][0], found[q(2)][0], found[HEAD][0]) == (f"base:{q(1)}", f"b:{q(2)}", f"b:{HEAD}")


def test_several_stacks_merge_each_by_itself(tmp_path: Path) -> None:
    for name in ("two-a", "two-b"):
        tensors = llama(layers=2)
        tensors |= {f"vision.blocks.{i}.w": ("F32", (4,)) for i in range(3)} | {"vision.embed.w": ("F32", (4,))}
        write_sketch(tmp_path / name, tensors)
    models = [{"model": "two-a"}, {"model": "two-b"}]
    weight = {"weight": [{"filter": "vision", "value": [0, 1]}, {"value": 1}]}
    plan = plan_of({"merge_method": "linear", "models": models, "parameters": weight | {"normalize": False}})
    found = name_inputs(plan)
    assert len(found) == 2 * 9 + 3 + 4
    assert found["vision.blocks.2.w"] == ("two-a:vision.blocks.2.w", "two-b:vision.blocks.2.w")


def test_slices_of_several_stacks_are_refused_with_their_names(tmp_path: Path) -> None:
    write_sketch(tmp_path / "two", {"x.0.w": ("F32", (2,)), "y.0.w": ("F32", (2,))})
    with pytest.raises(PlanError, match="'slices' needs models with one stack of layers; these have x, y"):
        stack(source("two", 0, 1))


def test_layers_that_a_model_does_not_have_are_refused_with_how_many_it_has() -> None:
    with pytest.raises(PlanError, match=r"layer_range \[1, 4\] of a: it has 3 layers, 0 to 2"):
        stack(source("a", 1, 4))


def test_models_of_different_heights_are_refused_with_their_heights(tmp_path: Path) -> None:
    write_sketch(tmp_path / "tall", llama(layers=4))
    models = [{"model": "a"}, {"model": "tall"}]
    with pytest.raises(PlanError, match=r"a has 3, tall has 4; say with 'slices'"):
        plan_of({"merge_method": "linear", "models": models, "parameters": {"weight": 1}})


def test_a_model_that_lacks_a_layer_is_refused_beside_one_that_has_it(tmp_path: Path) -> None:
    write_sketch(tmp_path / "gap", {name: of for name, of in llama().items() if "layers.1." not in name})
    models = [{"model": "a"}, {"model": "gap"}]
    with pytest.raises(PlanError, match=r"model\.layers\.1\.input_layernorm\.weight is in a but not in gap"):
        plan_of({"merge_method": "linear", "models": models, "parameters": {"weight": 1}})


def test_a_stack_of_which_only_some_numbers_have_weights_keeps_its_numbers(tmp_path: Path) -> None:
    projector = {f"projector.{i}.weight": ("F32", (2,)) for i in (0, 2)}
    for name in ("c", "d"):
        write_sketch(tmp_path / name, llama() | projector)
    models = [{"model": "c"}, {"model": "d"}]
    found = name_inputs(plan_of({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}))
    assert [name for name in found if name.startswith("projector")] == list(projector)


def test_a_model_without_layers_is_merged(tmp_path: Path) -> None:
    for name in ("flat", "other"):
        write_sketch(tmp_path / name, {"weight": ("F32", (2,)), "embed.weight": ("F32", (2,))})
    plan = plan_of({"merge_method": "linear", "models": [{"model": "flat"}, {"model": "other"}], **WEIGHT})
    assert name_inputs(plan) == {name: (f"flat:{name}", f"other:{name}") for name in ("weight", "embed.weight")}


def test_a_number_in_a_name_may_be_any(tmp_path: Path) -> None:
    names = [
        "l.0.w",
        "l.20000000.w",
        "l.999999999.w",
        f"l.{'9' * 5000}.w",
        "a.1²",
        "a.٣",
        *(f"s{i}.9.w" for i in range(2000)),
    ]
    write_sketch(tmp_path / "far", dict.fromkeys(names, ("F32", (1,))))
    found = name_inputs(plan_of({"merge_method": "linear", "models": [{"model": "far"}], "parameters": {"weight": 1}}))
    assert found == {name: (f"far:{name}",) for name in names}


@pytest.mark.parametrize("ranges", [[[0, 1], [0, 0], [1, 2]], [[0, 0]], [[0, 0], [0, 0]]])
def test_an_empty_slice_elsewhere_than_at_an_end_is_refused(ranges: list[list[int]], tmp_path: Path) -> None:
    folder = write_sketch(tmp_path / "m", llama(), config=config())
    slices = [{"sources": [{"model": str(folder), "layer_range": each}]} for each in ranges]
    with pytest.raises(PlanError, match="elsewhere it does nothing"):
        plan_of({"merge_method": "passthrough", "slices": slices})
