"""MXFP4 as gpt-oss stores it: ``NAME_blocks`` of 32 values of 4 bits, and ``NAME_scales``, an exponent of 2 for each.

Of packed experts, blocks lie along the columns of ``[expert, out, in]``, and loaders want ``[expert, in, out]`` (as
``convert_moe_packed_tensors`` of transformers gives it); of a layer of its own, called ``….weight``, they want what is
stored. (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf)
"""

from mergemill.engine.offers.beside import find_dtype, find_stored, make_offer, refuse, replace_offers
from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.dequantized import Codes, Dequantized, Stride, Transposed
from mergemill.engine.tensors.expressions import Expression, Stored
from mergemill.engine.tensors.numbers import Listed

BLOCK = 32
_BLOCKS, _SCALES = "_blocks", "_scales"


def offer_mxfp4(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, with blocks and scales as one."""
    made: dict[str, Offer] = {}
    for blocks in offers:
        name = blocks.removesuffix(_BLOCKS)
        scales = f"{name}{_SCALES}"
        if blocks == name or scales not in offers or name in offers:
            continue
        values, exponents = find_stored(offers, blocks), find_stored(offers, scales)
        if values is None or exponents is None or (values.dtype, exponents.dtype) != ("U8", "U8"):
            raise refuse(asked.checkpoint, blocks, "and its scales are not stored as U8")
        shape = _find_shape(values, exponents)
        if shape is None:
            said = f"has shape {list(values.shape)}, which does not suit scales of {list(exponents.shape)}"
            raise refuse(asked.checkpoint, blocks, said)
        expression = _express(name, values, exponents, shape, find_dtype(asked.checkpoint.config))
        made[name] = make_offer(expression, (blocks, scales), name, offers)
    return replace_offers(offers, made) if made else offers


def _find_shape(values: Stored, scales: Stored) -> tuple[int, ...] | None:
    """Return the values' shape as they lie; None where the scales are of other ones."""
    half, whole = BLOCK // 2, scales.shape
    together = (*whole[:-1], whole[-1] * half) if whole else ()  # the bytes of all blocks of a row
    suits = values.shape in ((*whole, half), together) and len(whole) >= 2 and values.size > 0
    return (*whole[:-1], whole[-1] * BLOCK) if suits else None


def _express(name: str, values: Stored, scales: Stored, shape: tuple[int, ...], dtype: str) -> Expression:
    rows, columns = shape[-2:]
    codes, exponents = Codes(values, 4, "E2M1"), Listed(scales, exponents=True)
    if len(shape) < 3 or name.endswith(".weight"):
        return Dequantized(codes, exponents, shape, dtype, rows, columns, columns, 1, BLOCK)
    return Transposed(
        codes,
        exponents,
        (*shape[:-2], columns, rows),
        dtype,
        columns,
        rows,
        row_step=Stride(1),
        column_step=Stride(columns),
        matrix_codes=rows * columns,
        group=1,
        across=BLOCK,
    )
