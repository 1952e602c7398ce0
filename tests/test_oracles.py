"""The oracle against cases worked out by hand."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from oracles import (
    Array,
    Bools,
    dare_linear,
    dare_ties,
    evaluate,
    expected,
    find_largest,
    linear,
    passthrough,
    slerp,
    task_arithmetic,
    ties,
)


def array(*values: float) -> Array:
    return np.array(values, dtype=np.float64)


def make_model(value: float, *, layers: int = 2, tied: bool = False) -> dict[str, Array]:
    """A decoder whose tensors tell where they are from: embedding +0.5, layer i +i, norm +0.7, head +0.9."""
    tensors = {"model.embed_tokens.weight": array(value + 0.5)}
    tensors |= {f"model.layers.{i}.mlp.weight": array(value + i) for i in range(layers)}
    tensors |= {f"model.layers.{i}.attn.weight": array(value + i) for i in range(layers)}
    tensors["model.norm.weight"] = array(value + 0.7)
    return tensors if tied else tensors | {"lm_head.weight": array(value + 0.9)}


MODELS = {
    "ten": make_model(10),
    "twenty": make_model(20),
    "zero": make_model(0),
    "tied": make_model(30, tied=True),
    "tied2": make_model(40, tied=True),
    "long": make_model(50, layers=5),
}


def merge(recipe: Mapping[str, Any], **options: Any) -> dict[str, float]:
    """Return the merge of `MODELS`, one number a tensor, under short names."""
    merged = expected(recipe, MODELS.__getitem__, delta_dtype=np.float64, **options)
    short = {name.removeprefix("model.").removesuffix(".weight"): v for name, v in merged.items()}
    return {name.replace("layers.", ""): float(v[0]) for name, v in short.items()}


def source(model: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, last], "parameters": parameters}


def test_linear_divides_by_the_sum_of_weights() -> None:
    tensors = [array(1, 2), array(3, 6)]
    assert linear(tensors, weight=[1, 3]).tolist() == [2.5, 5]
    assert linear(tensors, weight=[1, 3], normalize=False).tolist() == [10, 20]


def test_slerp_of_a_right_angle_is_halfway_round() -> None:
    half = slerp(array(1, 0), array(0, 1), t=0.5)
    assert half == pytest.approx([np.sqrt(0.5)] * 2, abs=1e-15)
    assert slerp(array(2, 0), array(0, 3), t=0).tolist() == [2, 0]
    assert slerp(array(2, 0), array(0, 3), t=1) == pytest.approx([0, 3], abs=1e-15)


def test_slerp_is_linear_where_parallel_or_zero_is_not_parallel() -> None:
    assert slerp(array(1, 1), array(3, 3), t=0.25).tolist() == [1.5, 1.5]
    # a norm of zero counts as 1: the angle is a right one
    assert slerp(array(0, 0), array(1, 0), t=0.5) == pytest.approx([np.sqrt(0.5), 0], abs=1e-15)


def test_task_arithmetic_adds_weighted_deltas() -> None:
    deltas = [array(1, -1), array(2, 2)]
    assert task_arithmetic(array(5, 5), deltas, weight=[1, 0.5]).tolist() == [7, 5]
    assert task_arithmetic(array(5, 5), deltas, weight=[1, 0.5], lambda_=2).tolist() == [9, 5]
    assert task_arithmetic(array(0, 0), deltas, weight=[3, 1], normalize=True).tolist() == [1.25, -0.25]
    cancelling = task_arithmetic(array(0, 0), deltas, weight=[1, -1], normalize=True)
    assert cancelling.tolist() == [-1, -3]


def test_largest_of_equals_is_the_first() -> None:
    assert find_largest(array(1, -2, 2, 2), 0.5).tolist() == [False, True, True, False]
    assert find_largest(array(0, 1, -3), 0.01).tolist() == [False, False, True]
    assert find_largest(array(1, 2, 3), 0.99).tolist() == [False, True, True]
    assert find_largest(array(1, 2), 1).all()
    assert not find_largest(array(1, 2), 0).any()


def test_ties_elects_signs_and_divides_by_what_agreed() -> None:
    deltas = [array(4, 1, -3, 0), array(-1, 1, -5, 0)]
    # 4-1 > 0 keeps 4; both; both; none
    assert ties(array(0, 0, 0, 9), deltas, weight=[1, 1], density=[1, 1]).tolist() == [4, 1, -4, 9]
    raw = ties(array(0, 0, 0, 9), deltas, weight=[1, 1], density=[1, 1], normalize=False)
    assert raw.tolist() == [4, 2, -8, 9]
    # trimmed to [4, 0, -3, 0] and [-1, 0, -5, 0], then halved by lambda
    half = ties(array(0, 0, 0, 0), deltas, weight=[1, 3], density=[0.5, 0.5], lambda_=0.5)
    assert half.tolist() == [2, 0, (-3 - 15) / 4 / 2, 0]


def test_ties_counts_a_zero_sum_as_positive() -> None:
    assert ties(array(0), [array(2), array(-2)], weight=[1, 1], density=[1, 1]).tolist() == [2]


def test_ties_rescales_to_the_norm_before() -> None:
    kept = ties(array(0, 0), [array(3, 1)], weight=[1], density=[0.5], rescale=True)
    assert kept.tolist() == [4, 0]


def test_negative_weight_turns_the_sign() -> None:
    both = ties(array(0), [array(2), array(1)], weight=[-1, 1], density=[1, 1])
    assert both.tolist() == [2]  # -2 wins; (-1·2) / -1


def test_dare_drops_by_mask_and_rescales() -> None:
    masks: list[Bools] = [np.array([True, False]), np.array([True, True])]
    deltas = [array(1, 3), array(-2, 2)]
    assert dare_linear(array(0, 0), deltas, masks=masks, weight=[1, 1]).tolist() == [2, 2]
    plain = dare_linear(array(0, 0), deltas, masks=masks, weight=[1, 1], rescale=False)
    assert plain.tolist() == [-1, 2]
    mean = dare_linear(array(0, 0), deltas, masks=masks, weight=[1, 1], normalize=True)
    assert mean.tolist() == [1, 1]
    assert dare_ties(array(0, 0), deltas, masks=masks, weight=[1, 1]).tolist() == [4, 2]


def test_nothing_kept_is_not_rescaled() -> None:
    nothing: list[Bools] = [np.array([False])]
    assert dare_linear(array(7), [array(1)], masks=nothing, weight=[1]).tolist() == [7]


def test_passthrough_scales_where_told() -> None:
    assert passthrough(array(3)).tolist() == [3]
    assert passthrough(array(3), scale=0).tolist() == [0]


@pytest.mark.parametrize(
    ("value", "t", "result"),
    [
        (0.5, 1.0, 0.5),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.75, 0.5),
        ([7], 0.3, 7),
        (["a", "b", "c"], 0.49, "a"),
        (["a", "b", "c"], 0.5, "b"),
        ([{"filter": "attn", "value": 1}, {"filter": "*", "value": 2}, {"value": 3}], 0.0, 2),
        ([{"filter": r"re:^x\.\d+\.mlp", "value": [0, 2]}], 0.5, 1),
        ([{"filter": "attn", "value": 1}], 0.5, None),
    ],
)
def test_setting_follows_depth_and_name(value: Any, t: float, result: Any) -> None:
    assert evaluate(value, name="x.3.mlp.weight", t=t) == result


def test_gradient_runs_over_the_slice_and_is_its_start_outside() -> None:
    source_b = {"model": "twenty", "parameters": {"weight": [0, 1]}}
    recipe = {"models": [{"model": "ten", "parameters": {"weight": [1, 0]}}, source_b]}
    merged = merge({"merge_method": "linear", **recipe})
    assert merged["0.mlp"] == 10
    assert merged["1.mlp"] == 21
    assert (merged["embed_tokens"], merged["norm"], merged["lm_head"]) == (10.5, 10.7, 10.9)


def test_gradient_of_a_single_layer_is_its_end() -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [source("ten", 0, 1, scale=[1, 2])]}, {"sources": [source("ten", 1, 2)]}],
    }
    assert merge(recipe)["0.mlp"] == 20


def test_source_then_slice_then_module_then_recipe() -> None:
    filtered = [{"filter": "mlp", "value": 3}]
    recipe = {
        "merge_method": "linear",
        "parameters": {"weight": 1, "normalize": False},
        "modules": {
            "default": {
                "parameters": {"weight": [{"filter": "norm", "value": 5}]},
                "slices": [
                    {
                        "parameters": {"weight": [{"filter": "0.attn", "value": 4}]},
                        "sources": [source("ten", 0, 2, weight=filtered)],
                    }
                ],
            }
        },
    }
    merged = merge(recipe)
    assert (merged["0.mlp"], merged["0.attn"], merged["1.attn"]) == (30, 40, 11)
    assert merged["norm"] == pytest.approx(53.5)


def test_slices_stack_layers_and_take_the_ends_from_first_and_last() -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("ten", 0, 2)]},
            {"sources": [source("long", 2, 4)]},
            {"sources": [source("twenty", 1, 2)]},
        ],
    }
    merged = merge(recipe)
    assert [merged[f"{i}.mlp"] for i in range(5)] == [10, 11, 52, 53, 21]
    assert "5.mlp" not in merged
    assert (merged["embed_tokens"], merged["norm"], merged["lm_head"]) == (10.5, 20.7, 20.9)


def test_unlisted_base_joins_with_models() -> None:
    recipe = {"base_model": "zero", "parameters": {"weight": 1}, "models": [{"model": "ten"}]}
    assert merge({"merge_method": "linear", **recipe})["0.mlp"] == 5
    assert merge({"merge_method": "task_arithmetic", **recipe})["0.mlp"] == 10
    halfway = {"merge_method": "slerp", **recipe, "parameters": {"t": 0.5}}
    assert merge(halfway)["1.mlp"] == 6


def test_weight_of_a_listed_base_does_nothing() -> None:
    listed = [
        {"model": "zero", "parameters": {"weight": 99}},
        {"model": "ten", "parameters": {"weight": 0.5}},
    ]
    recipe = {"merge_method": "ties", "base_model": "zero", "models": listed}
    assert merge(recipe)["0.mlp"] == 10
    assert merge({**recipe, "parameters": {"normalize": False}})["0.mlp"] == 5


def test_base_missing_from_a_slice_is_an_error() -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "zero",
        "parameters": {"weight": 1},
        "slices": [{"sources": [source("ten", 0, 2)]}],
    }
    with pytest.raises(ValueError, match="not among the sources"):
        merge(recipe)


def test_missing_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="weight has no value"):
        merge({"merge_method": "linear", "models": [{"model": "ten"}]})


def test_head_is_written_unless_every_model_is_tied() -> None:
    def of(*names: str) -> dict[str, float]:
        return merge({"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": n} for n in names]})

    assert "lm_head" not in of("tied", "tied2")
    assert of("ten", "tied")["lm_head"] == pytest.approx((10.9 + 30.5) / 2)
    assert of("ten", "tied")["embed_tokens"] == 20.5


def test_mask_is_asked_for_name_model_shape_and_density() -> None:
    asked = []

    def mask(name: str, model: str, shape: tuple[int, ...], density: float) -> Bools:
        asked.append((name, model, shape, density))
        return np.full(shape, model == "ten")

    recipe = {
        "merge_method": "dare_linear",
        "base_model": "zero",
        "parameters": {"weight": 1, "density": 0.25},
        "models": [{"model": "ten"}, {"model": "twenty"}],
    }
    assert merge(recipe, mask=mask)["0.mlp"] == 10
    assert ("model.layers.1.mlp.weight", "twenty", (1,), 0.25) in asked


def test_deltas_are_rounded_as_asked() -> None:
    models = {"base": {"x.layers.0.w": array(1.0)}, "tuned": {"x.layers.0.w": array(1.0 + 2**-40)}}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "tuned", "parameters": {"weight": 1}}],
    }
    assert expected(recipe, models.__getitem__)["x.layers.0.w"] == 1
    assert expected(recipe, models.__getitem__, delta_dtype=np.float64)["x.layers.0.w"] > 1
