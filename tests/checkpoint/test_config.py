"""The config changes where the merge changed it, and nowhere else."""

import json

import pytest

from mergemill.engine.checkpoint import (
    LayerCount,
    choose_family,
    dtype_changes,
    find_layer_count,
    layer_changes,
    make_config,
    tie_changes,
    vocabulary_changes,
)
from mergemill.engine.errors import CheckpointError

DEFAULT = choose_family({})
TEXT = b"""{
  "zeta": {"kept": [1, 2]},
  "num_hidden_layers": 3,
  "layer_types": ["full", "sliding", "full"],
  "mlp_only_layers": [0, 2],
  "eos_token_id": [7, 8, 9],
  "name": "caf\\u00e9",
  "torch_dtype": "float16",
  "alpha": 1e-05
}
"""
CONFIG = json.loads(TEXT)


def change(source_layers: list[int], config=CONFIG, stack: str = "model.layers"):
    return layer_changes(config, choose_family(config), stack, [(config, layer) for layer in source_layers])


def test_nothing_changed_is_the_same_bytes():
    odd = b' {"a":1 ,"num_hidden_layers":2}'
    assert make_config(odd, {}) == odd
    assert make_config(odd, {("num_hidden_layers",): 2}) == odd


def test_change_keeps_order_escapes_and_unknown_keys():
    text = make_config(TEXT, {("num_hidden_layers",): 4, ("new",): True})
    assert text.startswith(b'{\n  "zeta": {\n    "kept": [\n      1,\n      2\n    ]\n  },\n  "num_hidden_layers": 4,')
    assert text.endswith(b'"alpha": 1e-05,\n  "new": true\n}\n')
    assert b'"caf\\u00e9"' in text
    assert json.loads(text) == CONFIG | {"num_hidden_layers": 4, "new": True}


def test_raw_unicode_and_a_missing_newline_stay():
    assert make_config('{"a": "é"}'.encode(), {("b",): 1}) == '{\n  "a": "é",\n  "b": 1\n}'.encode()


def test_true_does_not_count_as_one():
    assert json.loads(make_config(b'{"tie_word_embeddings": 1}', {("tie_word_embeddings",): True})) == {
        "tie_word_embeddings": True
    }


def test_layer_lists_follow_the_layers():
    assert change([0, 1, 1, 2, 0]) == {
        ("num_hidden_layers",): 5,
        ("layer_types",): ["full", "sliding", "sliding", "full", "full"],
        ("mlp_only_layers",): [0, 3, 4],
    }


def test_same_layers_change_nothing():
    assert change([0, 1, 2]) == {}


def test_same_number_of_other_layers_changes_the_lists():
    changes = change([1, 1, 1])
    assert changes[("layer_types",)] == ["sliding"] * 3
    assert make_config(TEXT, changes) != TEXT


def test_unknown_list_of_many_layers_follows_and_of_few_does_not():
    many = {"num_hidden_layers": 8, "x_per_layer": list(range(8)), "architectures": ["A"]}
    assert change([7, 0], many) == {("num_hidden_layers",): 2, ("x_per_layer",): [7, 0]}
    few = {"num_hidden_layers": 2, "eos_token_id": [1, 2]}
    assert change([0], few) == {("num_hidden_layers",): 1}


def test_pattern_string_follows_the_layers():
    config = {"num_hidden_layers": 4, "hybrid_override_pattern": "M-*E"}
    assert change([3, 0], config)[("hybrid_override_pattern",)] == "EM"


def test_empty_layer_list_stays_empty():
    assert change([0], {"num_hidden_layers": 2, "layer_types": []})[("layer_types",)] == []


def test_layer_that_a_list_lacks_is_an_error():
    with pytest.raises(CheckpointError) as refusal:
        change([0, 3])
    assert str(refusal.value) == "config.json: layer_types has 3 entries, none for layer 3"


@pytest.mark.parametrize(
    ("config", "stack", "path", "count"),
    [
        ({"num_hidden_layers": 32}, "model.layers", "num_hidden_layers", 32),
        ({"n_layer": 12, "model_type": "gpt2"}, "h", "n_layer", 12),
        ({"n_layers": 24, "model_type": "mpt"}, "transformer.blocks", "n_layers", 24),
        (
            {"text_config": {"num_hidden_layers": 34}, "vision_config": {"num_hidden_layers": 27}},
            "model.language_model.layers",
            "text_config.num_hidden_layers",
            34,
        ),
        (
            {"text_config": {"num_hidden_layers": 34}, "vision_config": {"num_hidden_layers": 27}},
            "model.vision_tower.vision_model.encoder.layers",
            "vision_config.num_hidden_layers",
            27,
        ),
        (
            {"vision_config": {"depth": 32}, "num_hidden_layers": 28},
            "visual.blocks",
            "vision_config.depth",
            32,
        ),
        ({"num_layers": 6, "num_decoder_layers": 8, "model_type": "t5"}, "encoder.block", "num_layers", 6),
        (
            {"num_layers": 6, "num_decoder_layers": 8, "model_type": "t5"},
            "decoder.block",
            "num_decoder_layers",
            8,
        ),
        (
            {"encoder_layers": 6, "decoder_layers": 4, "num_hidden_layers": 6, "model_type": "bart"},
            "model.decoder.layers",
            "decoder_layers",
            4,
        ),
    ],
)
def test_layer_count_is_found_for_its_stack(config, stack, path, count):
    assert find_layer_count(config, choose_family(config), stack) == LayerCount(tuple(path.split(".")), count)


@pytest.mark.parametrize(
    "config",
    [{}, {"num_hidden_layers": None}, {"num_hidden_layers": True}, {"text_config": []}],
)
def test_config_without_a_count_has_none_and_changes_nothing(config):
    assert find_layer_count(config, DEFAULT, "model.layers") is None
    assert layer_changes(config, DEFAULT, "model.layers", [(config, 0)]) == {}


@pytest.mark.parametrize("stack", ["model.visual.merger.mlp", "mtp.layers", "model.altup_projections"])
def test_stack_that_is_no_stack_of_layers_has_no_count(stack):
    assert find_layer_count({"num_hidden_layers": 2, "vision_config": {"depth": 2}}, DEFAULT, stack) is None


def test_encoder_count_does_not_stand_in_for_the_decoder():
    t5 = {"num_layers": 6, "num_decoder_layers": None, "model_type": "t5"}
    assert find_layer_count(t5, choose_family(t5), "decoder.block") is None


def test_nested_layer_lists_change_where_they_are():
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}, "layer_types": ["x", "y"]}
    assert change([1], config, "model.language_model.layers") == {
        ("text_config", "num_hidden_layers"): 1,
        ("text_config", "layer_types"): ["b"],
    }


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"torch_dtype": "float16"}, {("torch_dtype",): "bfloat16"}),
        ({"dtype": "float16"}, {("dtype",): "bfloat16"}),
        ({"torch_dtype": "bfloat16"}, {}),
        ({"torch_dtype": "torch.bfloat16"}, {}),
        ({}, {("dtype",): "bfloat16"}),
        ({"torch_dtype": None}, {("dtype",): "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32"}},
            {("dtype",): "bfloat16", ("text_config", "dtype"): "bfloat16"},
        ),
        ({"text_config": {"torch_dtype": "bfloat16"}}, {}),
    ],
)
def test_dtype_changes_under_the_key_that_is_there(config, changes):
    assert dtype_changes(config, "bfloat16") == changes


def test_tie_and_vocabulary_change_where_they_stand():
    config = {"tie_word_embeddings": True, "text_config": {"vocab_size": 5, "tie_word_embeddings": True}}
    assert tie_changes(config, tied=True) == {}
    assert tie_changes(config, tied=False) == {
        ("tie_word_embeddings",): False,
        ("text_config", "tie_word_embeddings"): False,
    }
    assert vocabulary_changes(config, 6) == {("text_config", "vocab_size"): 6}
    assert vocabulary_changes({}, 6) == {("vocab_size",): 6}


def test_a_layer_of_another_model_brings_its_own_entries():
    taller = CONFIG | {
        "num_hidden_layers": 4,
        "layer_types": ["full", "full", "full", "linear"],
        "mlp_only_layers": [3],
    }
    found = layer_changes(CONFIG, DEFAULT, "model.layers", [(CONFIG, 0), (taller, 3), (CONFIG, 1)])
    assert found[("layer_types",)] == ["full", "linear", "sliding"]
    assert found[("mlp_only_layers",)] == [0, 1]
    assert found[("num_hidden_layers",)] == 3


@pytest.mark.parametrize(
    "key", ["suppress_tokens", "eos_token_id", "mlp_multipliers", "mrope_section", "architectures"]
)
def test_lists_that_are_never_one_entry_a_layer_stay(key):
    config = {"num_hidden_layers": 8, key: [*range(8)]}
    assert layer_changes(config, DEFAULT, "model.layers", [(config, i) for i in (0, 1, 1)]) == {
        ("num_hidden_layers",): 3
    }


def test_two_factors_of_falcon_h1_are_no_list_of_layers():
    config = {"num_hidden_layers": 4, "mlp_multipliers": [0.9, 0.6]}
    changes = layer_changes(config, DEFAULT, "model.layers", [(config, i) for i in (0, 1, 2, 1, 2, 3)])
    assert changes == {("num_hidden_layers",): 6}


def test_half_a_surrogate_pair_stays_as_it_was_written():
    text = '{"é": "\\ud800", "dtype": "float32"}'.encode()
    assert json.loads(make_config(text, {("dtype",): "bfloat16"})) == {"é": "\ud800", "dtype": "bfloat16"}


def test_layers_that_a_config_counts_and_nobody_has_cost_nothing():
    config = {"num_hidden_layers": 10**11, "mlp_only_layers": 3, "moe_layers": [1]}
    found = layer_changes(config, DEFAULT, "model.layers", [(config, 1), (config, 0)])
    assert found == {("num_hidden_layers",): 2, ("moe_layers",): [0]}
