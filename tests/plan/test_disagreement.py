"""Configs that disagree on what weights mean are told, with both values and whose is written."""

from pathlib import Path
from typing import Any

import pytest
from plan.sketches import config, llama, plan_of, write_sketch

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


def warnings(folder: Path, own: dict[str, Any], other: dict[str, Any]) -> tuple[str, ...]:
    """Return what the plan of two models warns of."""
    for name, more in (("a", own), ("b", other)):
        write_sketch(folder / name, llama(), config=config(**more))
    models = [{"model": str(folder / name)} for name in "ab"]
    return plan_of({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}).warnings


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        ({"rope_parameters": None, "rope_theta": 1e4}, {"rope_parameters": None, "rope_theta": 1e6}, "rope_theta"),
        ({"rope_parameters": DEFAULT}, {"rope_parameters": None, "rope_theta": 5e5}, "rope_theta"),
        ({"rope_parameters": DEFAULT}, {"rope_parameters": LINEAR}, "the scaling of rope"),
        ({}, {"rope_scaling": {"type": "yarn", "factor": 4}}, "the scaling of rope"),
        ({"num_attention_heads": 2}, {"num_attention_heads": 4}, "attention heads"),
        ({}, {"num_key_value_heads": 2}, "key and value heads"),
        ({}, {"rms_norm_eps": 1e-5}, "epsilon of the norms"),
        ({}, {"hidden_act": "gelu"}, "activation"),
        ({"sliding_window": 4096}, {"sliding_window": None}, "sliding_window"),
        ({"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": None}, "softcap of attention"),
        ({"text_config": {"query_pre_attn_scalar": 256}}, {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar"),
    ],
)
def test_what_configs_disagree_on_is_told(
    tmp_path: Path, own: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    (warning,) = warnings(tmp_path, own, other)
    assert f"disagree on {words}, so" in warning
    assert f"{tmp_path}/a has " in warning
    assert "which is written; " in warning
    assert f"; {tmp_path}/b " in warning


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"rope_parameters": DEFAULT}, {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}),
        ({"hidden_act": "silu"}, {"max_position_embeddings": 9, "use_cache": False, "_name_or_path": "x"}),
        ({"layer_norm_eps": 1e-6}, {}),
    ],
)
def test_configs_that_say_one_thing_in_two_ways_do_not_disagree(
    tmp_path: Path, own: dict[str, Any], other: dict[str, Any]
) -> None:
    assert warnings(tmp_path, own, other) == ()
