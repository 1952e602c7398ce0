"""FP8 and INT8 values and their scales are one tensor: that of transformers and of compressed-tensors, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from offers.quantized import (
    NAME,
    STEM,
    assert_same,
    make_bytes,
    make_fp8,
    make_values,
    offers_of,
    read_offer,
    write_model,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from mergemill.engine.errors import PlanError

BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
SHAPES = [(256, 384), (128, 128), (384, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_fp8_is_what_transformers_makes_of_it(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = make_fp8(*shape)
    scales = make_values(shape[0] // 128, shape[1] // 128).abs().to(dtype)
    folder = write_model(tmp_path / "a", {NAME: values, f"{NAME}_scale_inv": scales}, **BLOCKS)
    reference = Fp8Dequantize(None)
    assert_same(read_offer(folder), reference._dequantize_one(values, scales, torch.float32))
    assert_same(read_offer(folder, dtype="BF16"), reference._dequantize_one(values, scales, torch.bfloat16))


@pytest.mark.parametrize("shape", [(130, 200), (1, 1), (127, 129), (300, 5)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), None])
def test_blocks_at_the_edges_are_smaller(tmp_path: Path, shape: tuple[int, int], block: tuple[int, int] | None) -> None:
    """As in DeepSeek's own weight_dequant; transformers refuses such shapes."""
    down, across = block or (128, 128)
    values, scales = make_fp8(*shape), make_values(-(-shape[0] // down), -(-shape[1] // across))
    config: dict[str, Any] = {"quantization_config": {"weight_block_size": list(block)}} if block else {}
    folder = write_model(tmp_path / "a", {NAME: values, f"{NAME}_scale_inv": scales}, **config)
    each = scales.repeat_interleave(down, 0).repeat_interleave(across, 1)[: shape[0], : shape[1]]
    assert_same(read_offer(folder), values.float() * each)


def test_packed_experts_have_blocks_of_their_own(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values, scales = make_fp8(3, 130, 140), make_values(3, 2, 2)
    folder = write_model(tmp_path / "a", {name: values, f"{name}_scale_inv": scales}, **BLOCKS)
    each = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :130, :140]
    assert_same(read_offer(folder, name), values.float() * each)


KINDS = {
    "of the tensor": ((), "tensor"),
    "of the tensor, as a list": ((1,), "tensor"),
    "of a channel": ((48, 1), "channel"),
    "of a channel, flat": ((48,), "channel"),
    "of a group": ((48, 4), "group"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", ["fp8", "int8", "int8 with zero points"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_those_of_compressed_tensors(
    tmp_path: Path, kind: str, values: str, scale_dtype: torch.dtype
) -> None:
    strategy = KINDS[kind][1]
    args = QuantizationArgs(
        num_bits=8,
        type="float" if values == "fp8" else "int",
        strategy=strategy,
        symmetric="zero" not in values,
        group_size=32 if strategy == "group" else None,
    )
    shape = KINDS[kind][0]
    stored = make_fp8(48, 128) if values == "fp8" else make_bytes(48, 128).view(torch.int8)
    scale = (make_values(*shape) if shape else make_values(1)[0]).to(scale_dtype)
    tensors = {NAME: stored, f"{NAME}_scale": scale}
    zero = None
    if "zero" in values:
        zero = make_bytes(*shape, seed=2).view(torch.int8) if shape else torch.tensor(-7, dtype=torch.int8)
        tensors[f"{NAME}_zero_point"] = zero
    folder = write_model(tmp_path / "a", tensors, quantization_config={"quant_method": "compressed-tensors"})
    full = scale[:, None] if shape == (48,) else scale
    full_zero = zero[:, None] if zero is not None and shape == (48,) else zero
    wanted = dequantize(stored, full.float(), full_zero, args, dtype=torch.float32)
    assert_same(read_offer(folder), wanted)
    assert_same(read_offer(folder, dtype="BF16"), wanted.bfloat16())


def test_float8_e5m2_is_known(tmp_path: Path) -> None:
    values = make_fp8(16, 16, dtype=torch.float8_e5m2)
    folder = write_model(tmp_path / "a", {NAME: values, f"{NAME}_scale": torch.tensor(0.25)})
    assert_same(read_offer(folder), values.float() * 0.25)


def test_exponents_scale_as_transformers_has_them(tmp_path: Path) -> None:
    """MXFP8: a byte is an exponent of 2, for 32 columns of a row."""
    values, scales = make_fp8(8, 64), torch.tensor([[0, 120], [127, 200]] * 4, dtype=torch.uint8)
    folder = write_model(tmp_path / "a", {NAME: values, f"{NAME}_scale_inv": scales})
    assert_same(read_offer(folder), Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32))


def test_what_inference_alone_needs_goes_with_its_weight(tmp_path: Path) -> None:
    tensors = {NAME: make_fp8(8, 8), f"{NAME}_scale": torch.ones(1), f"{STEM}.input_scale": torch.ones(1)}
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors |= {key: make_fp8(8, 8), f"{key}_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    offers = offers_of(write_model(tmp_path / "a", tensors))
    assert offers[NAME].uses == (NAME, f"{NAME}_scale", f"{STEM}.input_scale")
    assert offers[key].uses == (key, f"{key}_scale", "model.layers.0.self_attn.k_scale")
    assert set(offers) == {NAME, key, "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({}, "BF16"),
        ({"dtype": "float16"}, "F16"),
        ({"dtype": None, "torch_dtype": "float32"}, "F32"),
        ({"dtype": None}, "BF16"),
    ],
)
def test_its_own_dtype_is_what_the_config_says(tmp_path: Path, said: dict[str, Any], dtype: str) -> None:
    folder = write_model(tmp_path / "a", {NAME: make_fp8(8, 8), f"{NAME}_scale": torch.ones(1)}, **said)
    assert offers_of(folder)[NAME].dtype == dtype


SHAPE = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(values=SHAPE, scales=SHAPE, block=st.sampled_from([None, [2, 2], [0, 1], ["a", 1], [3]]), zero=st.none() | SHAPE)
def test_shapes_that_do_not_suit_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, values: Any, scales: Any, block: Any, zero: Any
) -> None:
    tensors = {NAME: torch.zeros(values, dtype=torch.float8_e4m3fn), f"{NAME}_scale": torch.ones(scales)}
    if zero is not None:
        tensors[f"{NAME}_zero_point"] = torch.zeros(zero, dtype=torch.int8)
    folder = tmp_path_factory.mktemp("m") / "a"
    write_model(folder, tensors, quantization_config={"weight_block_size": block} if block else None)
    try:
        offers = offers_of(folder)
    except PlanError as error:
        assert f"{NAME}_" in str(error)  # noqa: PT017 - hypothesis gives what is refused, and what is not
        return
    if f"{NAME}_scale" not in offers:
        assert read_offer(folder).shape == values


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_model(tmp_path / "a", {NAME: make_fp8(8, 8), f"{NAME}_scale": torch.ones(1).to(dtype)})
    with pytest.raises(PlanError, match=f"{NAME}_scale is stored as"):
        offers_of(folder)
