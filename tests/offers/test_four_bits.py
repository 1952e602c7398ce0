"""Values of 4 bits are what the packages that store them make of them: MXFP4, NVFP4, GPTQ, AWQ, packed words, NF4."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from models import read_tensors
from offers.quantized import (
    NAME,
    STEM,
    assert_same,
    make_bytes,
    make_fp8,
    make_values,
    offers_of,
    read_expression,
    read_offer,
    write_model,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mergemill.engine.errors import MergeError, PlanError

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def make_mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return make_bytes(*shape, 16), make_bytes(*shape, seed=2) % 60 + 90


@pytest.mark.parametrize("shape", [(3, 10, 2), (1, 7, 1), (2, 33, 4)])
def test_experts_of_gpt_oss_are_what_transformers_makes_of_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    blocks, scales = make_mxfp4(*shape)
    wanted = convert_moe_packed_tensors(blocks, scales)
    for stored in (blocks, blocks.flatten(-2)):
        folder = write_model(tmp_path / str(stored.dim()), {f"{EXPERTS}_blocks": stored, f"{EXPERTS}_scales": scales})
        assert offers_of(folder)[EXPERTS].uses == (f"{EXPERTS}_blocks", f"{EXPERTS}_scales")
        assert_same(read_offer(folder, EXPERTS, "BF16"), wanted)


def test_mxfp4_of_a_layer_of_its_own_lies_as_it_is_stored(tmp_path: Path) -> None:
    blocks, scales = make_mxfp4(6, 3)
    folder = write_model(tmp_path / "a", {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales})
    assert_same(
        read_offer(folder, dtype="BF16"), convert_moe_packed_tensors(blocks[None], scales[None])[0].T.contiguous()
    )


def test_fp4_that_is_stored_as_whole_numbers_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    values, scales = make_bytes(8, 32).view(torch.int8), make_bytes(8, 2) % 60 + 90
    folder = write_model(tmp_path / "a", {NAME: values, f"{NAME}_scale_inv": scales})
    assert_same(read_offer(folder), Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32))


def scheme_of(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def write_compressed(folder: Path, compressor: Any, scheme: QuantizationScheme, state: dict[str, Any]) -> torch.Tensor:
    """Write what compressed-tensors makes of a layer's state; return what it makes of that again."""
    stored = compressor.compress(state, scheme)
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    write_model(folder, {f"{STEM}.{name}": tensor for name, tensor in stored.items()}, **config)
    decompressed: torch.Tensor = compressor.decompress(dict(stored), scheme)["weight"]
    return decompressed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "shape"), [("group", (24, 64)), ("channel", (10, 37)), ("tensor", (5, 16))])
def test_packed_words_are_those_of_compressed_tensors(
    tmp_path: Path, bits: int, symmetric: bool, strategy: str, shape: tuple[int, int]
) -> None:
    across = {"group": (shape[0], 2), "channel": (shape[0], 1), "tensor": (1,)}[strategy]
    group = {"group_size": 32} if strategy == "group" else {}
    scheme = scheme_of(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **group)
    state = {"weight": make_values(*shape), "weight_scale": make_values(*across, seed=2).abs() / 10 + 0.001}
    if not symmetric and strategy != "tensor":
        state["weight_zero_point"] = (make_bytes(*across, seed=3).int() % (1 << bits)).sub(1 << bits - 1).to(torch.int8)
    if not symmetric and strategy == "tensor":
        pytest.skip("a tensor's zero point is not packed by compressed-tensors")
    wanted = write_compressed(tmp_path / "a", PackedQuantizationCompressor, scheme, state)
    assert_same(read_offer(tmp_path / "a"), wanted)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_nvfp4_is_that_of_compressed_tensors(tmp_path: Path, dtype: str) -> None:
    scheme = scheme_of(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scale = make_fp8(12, 4).float().abs().add(1)
    state = {"weight": make_values(12, 64), "weight_scale": scale, "weight_global_scale": torch.tensor([733.0])}
    wanted = write_compressed(tmp_path / "a", NVFP4PackedCompressor, scheme, state)
    found = read_offer(tmp_path / "a", dtype=dtype)
    assert_same(found.bfloat16(), wanted.bfloat16())


def test_nvfp4_of_modelopt_is_scaled_by_both_of_its_scales(tmp_path: Path) -> None:
    """As its NVFP4QTensor.dequantize: ``value · (scale · scale_2)``."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values, scales, shared = make_bytes(6, 32), make_fp8(6, 4), torch.tensor(0.0123)
    tensors = {NAME: values, f"{NAME}_scale": scales, f"{NAME}_scale_2": shared, f"{STEM}.input_scale": shared.clone()}
    folder = write_model(tmp_path / "a", tensors)
    codes = torch.stack([values & 15, values >> 4], -1).flatten(1).long()
    wanted = table[codes] * (scales.float() * shared).repeat_interleave(16, 1)
    assert_same(read_offer(folder), wanted)
    assert offers_of(folder)[NAME].uses == (NAME, f"{NAME}_scale", f"{NAME}_scale_2", f"{STEM}.input_scale")


def test_mxfp4_is_that_of_compressed_tensors(tmp_path: Path) -> None:
    scheme = scheme_of(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    state = {"weight": make_values(6, 64), "weight_scale": torch.tensor([[0.25, 2.0**-9]] * 6)}
    wanted = write_compressed(tmp_path / "a", MXFP4PackedCompressor, scheme, state)
    assert_same(read_offer(tmp_path / "a", dtype="BF16"), wanted.bfloat16())


def pack_words(codes: torch.Tensor, bits: int, order: list[int]) -> torch.Tensor:
    """Return words of 32 bits along the last axis: code `order[i]` of each group in place i."""
    each = 32 // bits
    groups = codes.long().reshape(*codes.shape[:-1], -1, each)[..., order]
    words = (groups << (bits * torch.arange(each))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


AWQ = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's order of packing


def write_gptq(
    folder: Path, bits: int, order: torch.Tensor | None, *, kind: str, columns: int = 64, rows: int = 24
) -> torch.Tensor:
    """Write a layer as AutoGPTQ, GPTQModel or AutoAWQ would; return the float32 of their formula."""
    groups = 4
    codes, zeros = make_bytes(columns, rows).int() % (1 << bits), make_bytes(groups, rows, seed=2).int() % (1 << bits)
    scales = make_values(groups, rows).half()
    group = torch.arange(columns) // (columns // groups) if order is None else order
    wanted = ((codes.double() - zeros.double()[group]) * scales.double()[group]).float().T
    plain = list(range(32 // bits))
    tensors = {f"{STEM}.scales": scales}
    if kind == "awq":
        tensors |= {f"{STEM}.qweight": pack_words(codes, 4, AWQ), f"{STEM}.qzeros": pack_words(zeros, 4, AWQ)}
    else:
        stored = zeros if kind == "gptq_v2" else (zeros.int() - 1) % (1 << bits)
        words = pack_words(codes.T.contiguous(), bits, plain).T
        tensors |= {f"{STEM}.qweight": words, f"{STEM}.qzeros": pack_words(stored, bits, plain)}
        tensors[f"{STEM}.g_idx"] = group.int()
    config = {"quant_method": "awq" if kind == "awq" else "gptq", "bits": bits, "checkpoint_format": kind}
    write_model(folder, tensors, quantization_config=config, dtype="float16")
    return wanted.contiguous()


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_and_awq_are_their_published_formula(tmp_path: Path, kind: str, bits: int) -> None:
    if kind == "awq" and bits == 8:
        pytest.skip("AWQ has 4 bits")
    wanted = write_gptq(tmp_path / "a", bits, None, kind=kind)
    assert_same(read_offer(tmp_path / "a"), wanted)
    assert_same(read_offer(tmp_path / "a", dtype="F16"), wanted.half())
    offer = offers_of(tmp_path / "a")[NAME]
    assert (offer.dtype, set(offer.uses) >= {f"{STEM}.{each}" for each in ("qweight", "qzeros", "scales")}) == (
        "F16",
        True,
    )


def test_gptq_in_another_order_is_its_published_formula(tmp_path: Path) -> None:
    order = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(3))
    wanted = write_gptq(tmp_path / "b", 4, order, kind="gptq")
    assert_same(read_offer(tmp_path / "b"), wanted)


def test_a_group_that_there_is_not_is_an_error(tmp_path: Path) -> None:
    write_gptq(tmp_path / "a", 4, torch.arange(64) // 16, kind="gptq")
    order = torch.full((64,), 3)
    folder = tmp_path / "b"
    tensors = {**read_tensors(tmp_path / "a"), f"{STEM}.g_idx": (order + 1).int()}
    write_model(folder, {name: each for name, each in tensors.items() if name.startswith(STEM)})
    with pytest.raises(MergeError, match=r"g_idx\) names group 4 or 4 of 4"):
        read_expression(offers_of(folder)[NAME].expression, "F32", 100)


def write_nf4(folder: Path, shape: tuple[int, int], *, block: int, nested: bool, kind: str = "nf4") -> torch.Tensor:
    """Write a layer of bitsandbytes; return what its formula makes of it."""
    size = shape[0] * shape[1]
    blocks = -(-size // block)
    codes, table = make_bytes(-(-size // 2), 1), torch.linspace(-1, 1, 16)
    said: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {NAME: codes, f"{NAME}.quant_map": table}
    if nested:
        inner, inner_table = make_values(-(-blocks // 256)).abs(), torch.linspace(-1, 1, 256)
        quantized = make_bytes(blocks, seed=4)
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0371}
        tensors |= {
            f"{NAME}.absmax": quantized,
            f"{NAME}.nested_absmax": inner,
            f"{NAME}.nested_quant_map": inner_table,
        }
        scales = inner_table[quantized.long()] * inner.repeat_interleave(256)[:blocks] + 0.0371
    else:
        tensors[f"{NAME}.absmax"] = scales = make_values(blocks).abs()
    state = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    write_model(folder, {**tensors, f"{NAME}.quant_state.bitsandbytes__{kind}": state})
    both = torch.stack([codes[:, 0] >> 4, codes[:, 0] & 15], 1).flatten()[:size].long()
    return (table[both] * scales.repeat_interleave(block)[:size]).view(shape)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((96, 64), 64), ((7, 33), 32), ((300, 70), 64)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nf4_is_its_formula(tmp_path: Path, nested: bool, shape: tuple[int, int], block: int, kind: str) -> None:
    wanted = write_nf4(tmp_path / "a", shape, block=block, nested=nested, kind=kind)
    assert_same(read_offer(tmp_path / "a"), wanted)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nf4_is_what_bitsandbytes_makes_of_it(tmp_path: Path, nested: bool, kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(make_values(96, 128), quant_type=kind, compress_statistics=nested)
    beside = {f"{NAME}.{name}": each for name, each in state.as_dict(packed=True).items()}
    folder = write_model(tmp_path / "a", {NAME: packed, **beside})
    assert_same(read_offer(folder), functional.dequantize_4bit(packed, state))


def test_int8_of_bitsandbytes_is_what_it_makes_of_it(tmp_path: Path) -> None:
    values, scales = make_bytes(20, 30).view(torch.int8), make_values(20).abs()
    tensors = {NAME: values, f"{STEM}.SCB": scales, f"{STEM}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    folder = write_model(tmp_path / "a", tensors)
    assert_same(read_offer(folder), values * scales.view(-1, 1) * 7.874015718698502e-3)
    other = write_model(tmp_path / "b", {**tensors, f"{STEM}.weight_format": torch.tensor(1, dtype=torch.uint8)})
    with pytest.raises(PlanError, match="weight_format names another order"):
        offers_of(other)


SIDES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = {"U8": torch.uint8, "I32": torch.int32, "F16": torch.float16, "F8": torch.float8_e4m3fn, "I64": torch.int64}
TENSOR = st.tuples(st.sampled_from(list(DTYPES)), SIDES)
PARTS = [
    ["_blocks", "_scales"],
    ["_packed", "_scale", "_global_scale"],
    ["_packed", "_scale", "_shape", "_zero_point"],
    ["", "_scale", "_scale_2"],
    [".qweight", ".qzeros", ".scales", ".g_idx"],
    ["", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".nested_absmax", ".nested_quant_map"],
    ["", ".SCB", ".weight_format"],
]


@settings(max_examples=400, deadline=None)
@given(data=st.data(), parts=st.sampled_from(PARTS))
def test_parts_that_do_not_suit_are_refused_or_read_as_a_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, parts: list[str]
) -> None:
    tensors = {}
    for part in parts:
        of_layer = part.startswith((".qw", ".qz", ".scales", ".g_idx", ".SCB", ".weight_format"))
        name = f"{STEM if of_layer else NAME}{part}"
        dtype, shape = data.draw(TENSOR)
        values = data.draw(st.integers(0, 3))
        tensors[name] = torch.full(shape, values).to(DTYPES[dtype])
    if data.draw(st.booleans()):
        del tensors[data.draw(st.sampled_from(list(tensors)))]
    folder = write_model(tmp_path_factory.mktemp("m") / "a", tensors)
    try:
        offers = offers_of(folder)
    except PlanError as error:
        assert STEM in str(error)  # noqa: PT017 - hypothesis gives what is refused, and what is not
        return
    for name, offer in offers.items():
        if len(offer.uses) > 1:
            try:
                assert read_offer(folder, name).shape == offer.shape
            except MergeError as error:
                assert "g_idx" in str(error)  # noqa: PT017


STATES = st.dictionaries(
    st.sampled_from(["shape", "blocksize", "nested_blocksize", "nested_offset"]),
    st.one_of(
        st.integers(-4, 1 << 60), st.lists(st.integers(-3, 1 << 60) | st.text(), max_size=3), st.text(), st.none()
    ),
)


@settings(max_examples=200, deadline=None)
@given(said=STATES.map(lambda said: json.dumps(said).encode()) | st.binary(max_size=60))
def test_a_state_that_says_something_else_is_refused(tmp_path_factory: pytest.TempPathFactory, said: bytes) -> None:
    state = torch.tensor(np.frombuffer(said, np.uint8).copy())
    tensors = {NAME: make_bytes(32, 1), f"{NAME}.absmax": make_values(1), f"{NAME}.quant_map": make_values(16)}
    folder = tmp_path_factory.mktemp("m") / "a"
    write_model(folder, {**tensors, f"{NAME}.quant_state.bitsandbytes__nf4": state})
    try:
        offer = offers_of(folder)[NAME]
    except PlanError as error:
        assert f"{NAME}.quant_state" in str(error)  # noqa: PT017 - hypothesis gives what is refused, and what is not
        return
    assert offer.expression.size in (63, 64)
