"""What is quantised is known by any one of the words that say so, and plain models are not taken for it."""

from pathlib import Path
from typing import Any

import pytest
from models import write_json
from plan.sketches import Sketch, config, llama, write_sketch

from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.quantized import find_quantization

W = "model.layers.0.mlp.up_proj.weight"
STEM = W.removesuffix(".weight")
FP8 = {W: ("F8_E4M3", (16, 8))}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}


def find(folder: Path, tensors: Sketch, *, files: dict[str, Any] | None = None, **more: Any) -> str:
    """Return what is found of a Llama with `tensors` in the place of its own."""
    write_sketch(folder, llama() | dict(tensors), config=config(**more))
    for name, value in (files or {}).items():
        write_json(folder / name, value)
    return find_quantization(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    "more",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"quantization": {"bits": 4, "group_size": 64}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "awq"}}}},
    ],
)
def test_a_key_of_the_config_tells_at_any_depth(tmp_path: Path, more: dict[str, Any]) -> None:
    assert "config.json has " in find(tmp_path, {}, **more)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hf_quant_config.json", MODELOPT), ("quantize_config.json", {"bits": 4}), ("quant_config.json", {})],
)
def test_a_file_beside_the_weights_tells(tmp_path: Path, name: str, value: dict[str, Any]) -> None:
    assert name in find(tmp_path, {}, files={name: value})


COMPANIONS: dict[str, Sketch] = {
    "fp8 of one scale": FP8 | {f"{W}_scale": ("F32", (1,))},
    "block fp8": FP8 | {f"{W}_scale_inv": ("F32", (1, 1))},
    "block fp8 of packed experts": {
        "model.layers.0.mlp.experts.gate_up_proj": ("F8_E4M3", (2, 16, 8)),
        "model.layers.0.mlp.experts.gate_up_proj_scale_inv": ("F32", (2, 1, 1)),
    },
    "fp8 by a name of its own": {"x.proj": ("F8_E5M2", (4, 4)), "x.proj_scale": ("F32", ())},
    "mxfp4": {"x.gate_up_proj_blocks": ("U8", (2, 4)), "x.gate_up_proj_scales": ("U8", (2,))},
    "gptq": {f"{STEM}.qweight": ("I32", (1, 16)), f"{STEM}.g_idx": ("I32", (8,))},
    "awq": {f"{STEM}.qweight": ("I32", (8, 2)), f"{STEM}.qzeros": ("I32", (1, 2))},
    "bitsandbytes 4-bit": {W: ("U8", (64, 1)), f"{W}.absmax": ("F32", (2,)), f"{W}.quant_map": ("F32", (16,))},
    "its state alone": {f"{W}.quant_state.bitsandbytes__nf4": ("U8", (90,))},
    "bitsandbytes int8": {W: ("I8", (16, 8)), f"{STEM}.SCB": ("F32", (16,))},
    "mlx": {W: ("U32", (16, 1)), f"{STEM}.scales": ("F16", (16, 1)), f"{STEM}.biases": ("F16", (16, 1))},
    "whole numbers without a word": {W: ("I8", (16, 8))},
}


@pytest.mark.parametrize("kind", COMPANIONS)
def test_tensors_beside_the_weights_tell_and_are_named(tmp_path: Path, kind: str) -> None:
    tensors = COMPANIONS[kind]
    assert any(name in find(tmp_path, tensors) for name in tensors)


def test_a_plain_model_is_not_taken_for_a_quantised_one(tmp_path: Path) -> None:
    odd: Sketch = {
        "model.logit_scale": ("BF16", ()),
        "model.layers.0.layer_scale": ("BF16", (8,)),
        "model.layers.0.attn.gate": ("BF16", (8,)),
        "model.layers.0.attn.gate_scale": ("BF16", (8,)),
        "model.layers.0.position_ids": ("I64", (1, 8)),
        "model.relative_position_index": ("I64", (8, 8)),
        "model.layers.0.self_attn.k_scale": ("F32", ()),
        **FP8,  # a cast, without scales
    }
    assert find(tmp_path, odd, quantization_config=None) == ""


def test_modelopt_that_quantised_the_cache_alone_left_the_weights_as_they_are(tmp_path: Path) -> None:
    cache = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    assert find(tmp_path, {}, files={"hf_quant_config.json": cache}) == ""
