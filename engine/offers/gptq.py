"""GPTQ and AWQ: codes of 4 or 8 bits in words of 32, of weights stored as ``[in, out]``, with scales and zero points.

``qweight`` of GPTQ has words of several inputs (``[in / 8, out]``), that of AWQ of several outputs (``[in, out / 8]``),
in an order of its own. ``g_idx`` says the group of each input where GPTQ took them in another order (act-order). Zero
points of GPTQ are stored less 1, but for ``checkpoint_format: gptq_v2``. (AutoGPTQ, ``qlinear_cuda.py``; AutoAWQ,
``packing_utils.py``.)
"""

from collections.abc import Sequence

from mergemill.engine.checkpoint.quantized import read_settings
from mergemill.engine.offers.beside import find_dtype, find_stored, make_offer, refuse, replace_offers
from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.dequantized import Codes, Stride, Transposed
from mergemill.engine.tensors.expressions import Stored
from mergemill.engine.tensors.numbers import Listed, Nibbles

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of each of its outputs
_WORD = 32  # bits


def offer_gptq(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, with words, scales and zero points as one."""
    made: dict[str, Offer] = {}
    for qweight in offers:
        stem = qweight.removesuffix(".qweight")
        names = [f"{stem}.{each}" for each in ("qweight", "qzeros", "scales")]
        if stem == qweight or not all(name in offers for name in names) or f"{stem}.weight" in offers:
            continue
        parts = [find_stored(offers, name) for name in names]
        words, zeros, scales = parts
        if words is None or zeros is None or scales is None or (words.dtype, zeros.dtype) != ("I32", "I32"):
            raise refuse(asked.checkpoint, qweight, "or its zero points are not stored as I32")
        order = find_stored(offers, f"{stem}.g_idx")
        uses = [*names, *([f"{stem}.g_idx"] if order is not None else [])]
        made[f"{stem}.weight"] = make_offer(
            _express(qweight, (words, zeros, scales), order, asked), uses, f"{stem}.weight", offers
        )
    return replace_offers(offers, made) if made else offers


def _express(name: str, parts: tuple[Stored, Stored, Stored], order: Stored | None, asked: Asked) -> Transposed:
    words, zeros, scales = parts
    if not all(len(each.shape) == 2 and each.size for each in parts) or scales.dtype not in ("F16", "BF16", "F32"):
        raise refuse(asked.checkpoint, name, "or its scales or zero points are no matrices of their kind")
    groups, rows = scales.shape
    bits = zeros.shape[1] * _WORD // rows
    each = _WORD // bits if bits in (4, 8) else 1
    is_awq = words.shape[1] * each == rows and words.shape[1] != rows
    columns = words.shape[0] if is_awq else words.shape[0] * each
    suits = bits in (4, 8) and zeros.shape == (groups, rows // each) and rows % each == 0 and columns % groups == 0
    suits = suits and (words.shape[1] == rows or (is_awq and bits == 4 and order is None))
    if order is not None and (order.shape != (columns,) or order.dtype not in ("I32", "I64")):
        suits = False
    if not suits:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise refuse(asked.checkpoint, name, f"does not suit its zero points and scales: they have shapes {shapes}")
    added = 0 if is_awq or read_settings(asked.checkpoint).get("checkpoint_format") == "gptq_v2" else 1
    places: Sequence[int] = _AWQ_ORDER if is_awq else range(each)
    inner = tuple(places)
    row_step, column_step = Stride(each), Stride(rows * each, each, inner)
    if is_awq:
        row_step, column_step = Stride(each, each, inner), Stride(rows)
    return Transposed(
        Codes(words, bits, f"U{bits}"),
        Listed(scales),
        (rows, columns),
        find_dtype(asked.checkpoint.config),
        rows,
        columns,
        row_step=row_step,
        column_step=column_step,
        matrix_codes=rows * columns,
        group=columns // groups,
        across=1,
        zeros=Nibbles(zeros, bits, rows, along_rows=False, order=inner, added=added, wraps=True),
        order=order,
    )
