"""What a layer is by its place follows it, in a list that the family reads; or the stack is refused."""

from typing import Any

import pytest

from mergemill.engine.checkpoint.kinds import find_types, kind_changes
from mergemill.engine.errors import CheckpointError


def change(config: dict[str, Any], *layers: int, count: int = 8) -> dict[str, Any]:
    return kind_changes(config, [(config, layer, count) for layer in layers])


def full(*layers: int, other: str = "sliding", count: int) -> list[str]:
    return [f"{'full' if i in layers else other}_attention" for i in range(count)]


@pytest.mark.parametrize(
    ("config", "kept", "wanted"),
    [
        ({"model_type": "gemma2"}, (0, 1, 1, 2), full(1, 2, count=4)),
        ({"model_type": "gemma3_text"}, (*range(6), 5), full(5, 6, count=7)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, (0, 2, 1), full(1, count=3)),
        ({"model_type": "cohere2"}, (3, 0, 1, 2), full(0, count=4)),
        ({"model_type": "modernbert"}, (0, 1, 0), full(0, 2, count=3)),
        ({"model_type": "qwen3_next"}, (0, 3, 1), full(1, other="linear", count=3)),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            (0, 2, 1),
            full(0, 2, count=3),
        ),
    ],
)
def test_families_that_read_a_list_get_one(config: dict[str, Any], kept: tuple[int, ...], wanted: list[str]) -> None:
    assert change(config, *kept) == {"layer_types": wanted}


@pytest.mark.parametrize(
    ("config", "fits", "breaks"),
    [
        ({"first_k_dense_replace": 1}, (0, 1, 1, 2), (0, 1, 0)),
        ({"first_k_dense_replace": 0, "moe_layer_freq": 2}, (0, 1, 4, 3), (0, 2)),
        ({"num_dense_layers": 2}, (1, 0, 5), (0, 1, 1)),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, (0, 1, 6, 3), (2, 3)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (2, 3), (1, 2)),
        ({"decoder_sparse_step": 2}, (0, 1, 4), (1, 2)),
        ({"interleave_moe_layer_step": 2}, (2, 1), (1,)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 6}, (0, 3, 4), (1, 2)),
        ({"num_kv_shared_layers": 2}, (0, 1, 6, 7), (0, 1, 2, 3)),
        ({"no_rope_layer_interval": 4}, (4, 1, 2, 7), (3,)),
        ({"full_attention_interval": 4, "model_type": "unheard_of"}, (0, 1, 2, 3), (3, 0)),
    ],
)
def test_kinds_by_formula_stay_at_places_of_their_kind(
    config: dict[str, Any], fits: tuple[int, ...], breaks: tuple[int, ...]
) -> None:
    assert change(config, *fits) == {}
    key = next(iter(config))
    with pytest.raises(CheckpointError, match=rf"{key} gives each layer its kind by its place, and layer \d"):
        change(config, *breaks)


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"] * 4},
        {"first_k_dense_replace": 1, "mlp_layer_types": ["dense", *["sparse"] * 7]},
        {"attn_layer_period": 2, "layers_block_type": ["mamba", "attention"] * 4},
        {"decoder_sparse_step": 0},
        {"max_window_layers": 2, "use_sliding_window": False},
    ],
)
def test_a_list_stands_above_the_formula_and_a_period_of_0_says_nothing(config: dict[str, Any]) -> None:
    assert change(config, 1, 0, 0) == {}


def test_cycles_and_runs_of_kinds_are_written_out() -> None:
    griffin = {"block_types": ["recurrent", "recurrent", "attention"]}
    assert change(griffin, 0, 1, 2, 3) == {}
    assert change(griffin, 0, 2, 2) == {"block_types": ["recurrent", "attention", "attention"]}
    neo = {"attention_types": [[["global", "local"], 4]]}
    assert change(neo, 0, 1, 2) == {}
    assert change(neo, 0, 2, 3) == {"attention_types": [[["global"], 1], [["global"], 1], [["local"], 1]]}


def test_a_layer_of_another_model_brings_the_kind_that_its_own_config_gives_it() -> None:
    donor = {"model_type": "gemma2"}
    listed = {"model_type": "gemma2", "layer_types": ["full_attention"] * 4}
    assert kind_changes(donor, [(donor, 0, 4), (listed, 2, 4), (listed, 2, 4)]) == {"layer_types": full(1, 2, count=3)}


def test_what_a_list_could_say_of_a_layer_is_known() -> None:
    assert find_types({"model_type": "gemma2"}, 1, 4) == ("full_attention",)
    assert find_types({"model_type": "llama"}, 1, 4) == ()


@pytest.mark.parametrize("value", ["3", float("nan"), 1.5, True, [3], {}])
@pytest.mark.parametrize("key", ["first_k_dense_replace", "sliding_window_pattern", "num_kv_shared_layers"])
def test_layers_are_not_moved_by_a_key_that_tells_no_place(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{key}: .* is no whole number; without it"):
        change({key: value}, 0, 2, 1)
    assert change({key: None}, 0, 2, 1) == {}


@pytest.mark.parametrize("value", ["2", [2], float("nan"), None, 0, -1, {}])
def test_an_interval_that_is_none_counts_every_layer(value: object) -> None:
    assert change({"moe_layer_start_index": 1, "moe_layer_interval": value}, 0, 3, 4) == {}


def test_kinds_that_are_no_words_are_compared_as_they_are_written() -> None:
    assert find_types({"block_types": [{"a": 1}, "b"]}, 0, 4) == ("{'a': 1}",)


def test_kimis_lists_of_layers_are_counted_from_one() -> None:
    """Layers 4 and 8 (of eight, counted from 1) have full attention."""
    own = {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7], "head_dim": 16}
    config = {"linear_attn_config": own}
    assert change(config, 0, 3, 4, 7, 7) == {
        "linear_attn_config": {"full_attn_layers": [2, 4, 5], "kda_layers": [1, 3], "head_dim": 16}
    }
    assert change(config, *range(8)) == {}
    assert find_types(config, 3, 8) == ("full_attn_layers",)
    assert find_types(config, 4, 8) == ("kda_layers",)


def test_a_layer_that_uses_anothers_keys_and_values_comes_after_it() -> None:
    config = {"kv_source_layers": [0, 1, 1, 3, 3]}
    assert change(config, 0, 1, 2, 1, 2, 2, count=5) == {"kv_source_layers": [0, 1, 1, 3, 3, 3]}
    assert change(config, 3, 4, 4, 0, count=5) == {"kv_source_layers": [0, 0, 0, 3]}
    assert change(config, *range(5), count=5) == {}
    with pytest.raises(CheckpointError, match="layer 2 uses the keys and values of layer 1, which is not before it"):
        change(config, 0, 2, 1, count=5)
