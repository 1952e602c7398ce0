"""FP8 and INT8 values with their scales beside them: of a tensor, a channel, a group or a block.

``NAME_scale_inv`` is DeepSeek's (https://huggingface.co/deepseek-ai/DeepSeek-V3, of blocks of ``weight_block_size``),
``NAME_scale`` that of compressed-tensors, ModelOpt and FBGEMM. Either is multiplied; its shape says what it is of.
"""

import math
from collections.abc import Mapping
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.quantized import read_settings
from mergemill.engine.offers.beside import (
    check_numbers,
    find_dtype,
    find_stored,
    make_offer,
    refuse,
    replace_offers,
)
from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.dequantized import Codes, Dequantized
from mergemill.engine.tensors.expressions import Stored
from mergemill.engine.tensors.numbers import Listed

_VALUES = ("F8_E4M3", "F8_E5M2", "I8")
_BLOCK = 128  # where no config says it
_SCALES = ("_scale_inv", "_scale")


def offer_scaled(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, with values and scales as one."""
    made: dict[str, Offer] = {}
    for name in offers:
        values = find_stored(offers, name)
        if values is None or values.dtype not in _VALUES or not values.shape or not values.size:
            continue
        scale = next((found for ending in _SCALES if (found := f"{name}{ending}") in offers), None)
        if scale is not None and f"{name}_g_idx" not in offers:
            made[name] = _offer(name, values, scale, offers, asked.checkpoint)
    return replace_offers(offers, made) if made else offers


def _offer(name: str, values: Stored, scale: str, offers: Offers, checkpoint: Checkpoint) -> Offer:
    scales = find_stored(offers, scale)
    if scales is None:
        raise refuse(checkpoint, scale, "is no plain tensor")
    check_numbers(scale, scales, checkpoint)
    # Whole numbers with the scales of block FP8 are FP4, two values a byte, as transformers has it.
    is_fp4 = values.dtype == "I8" and scale.endswith("_scale_inv")
    whole = (*values.shape[:-1], 2 * values.shape[-1]) if is_fp4 else values.shape
    shape = (1, *whole) if len(whole) == 1 else whole
    rows, columns = shape[-2:]
    block_rows, block_columns = _find_block(scale, shape, whole, scales.shape, checkpoint)
    if scales.size == 1:
        rows = block_rows = math.prod(shape[:-1])
    zero, uses = f"{name}_zero_point", [name, scale]
    zeros = find_stored(offers, zero)
    if zeros is not None:
        check_numbers(zero, zeros, checkpoint)
        if zeros.size != scales.size:
            raise refuse(checkpoint, zero, f"has shape {list(zeros.shape)}, and its scales {list(scales.shape)}")
        uses.append(zero)
    expression = Dequantized(
        Codes(values, 4, "E2M1") if is_fp4 else Codes(values, 8, values.dtype),
        Listed(scales, exponents=scales.dtype == "U8"),
        whole,
        find_dtype(checkpoint.config),
        rows,
        columns,
        columns,
        block_rows,
        block_columns,
        None if zeros is None else Listed(zeros),
    )
    return make_offer(expression, uses, name, offers)


def _find_block(
    name: str, shape: tuple[int, ...], stored: tuple[int, ...], scales: tuple[int, ...], checkpoint: Checkpoint
) -> tuple[int, int]:
    """Return rows and columns of a block of a matrix; `PlanError` where the scales do not suit the values."""
    rows, columns = shape[-2:]
    if math.prod(scales) == 1:
        return rows, columns
    # One for each of the first axes, as of a channel or an expert, or one for each block of rows and columns.
    full = (*scales, *(1,) * (len(shape) - len(scales))) if scales == shape[: len(scales)] else scales
    if len(full) == len(shape) and full[:-2] == shape[:-2]:
        told = _find_told(checkpoint)
        found = [_divide(size, count, each) for size, count, each in zip((rows, columns), full[-2:], told, strict=True)]
        if None not in found:
            return found[0] or 1, found[1] or 1
    raise refuse(
        checkpoint,
        name,
        f"has shape {list(scales)}, which is no scale of a tensor, channel, group or block of {list(stored)}",
    )


def _divide(size: int, count: int, told: int | None) -> int | None:
    """Return how many elements each of `count` scales is of; None where that cannot be."""
    if told is not None and -(-size // told) == count:
        return told
    if count in (1, size):
        return max(1, size // count)
    if told is None and -(-size // _BLOCK) == count:
        return _BLOCK
    return size // count if told is None and count and size % count == 0 else None


def _find_told(checkpoint: Checkpoint) -> tuple[int | None, int | None]:
    """Return the block that the config says, rows and columns."""
    settings: Mapping[str, Any] = read_settings(checkpoint)
    block = settings.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block):
        return block[0], block[1]
    return None, None
