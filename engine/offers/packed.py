"""INT4 and INT8 of compressed-tensors (``pack-quantized``): codes of 4 or 8 bits in words of 32, along each row.

``weight_shape`` says how many columns a row has: its last word may be filled up. Zero points lie in words of several
rows, where there are any.
"""

import struct

from mergemill.engine.offers.beside import (
    check_numbers,
    find_dtype,
    find_stored,
    make_offer,
    read_said,
    refuse,
    replace_offers,
)
from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.dequantized import Codes, Dequantized
from mergemill.engine.tensors.expressions import Stored
from mergemill.engine.tensors.numbers import Listed, Nibbles, Numbers

_PACKED = ".weight_packed"
_WORD = 32  # bits


def offer_packed(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, with words, scales and zero points as one."""
    stored = {name.removesuffix(_PACKED): find_stored(offers, name) for name in offers if name.endswith(_PACKED)}
    words = {f"{stem}.weight": each for stem, each in stored.items() if each is not None and each.dtype == "I32"}
    lacking = [name for name in words if f"{name}_shape" not in offers or f"{name}_scale" not in offers]
    words = {name: each for name, each in words.items() if name not in lacking and f"{name}_g_idx" not in offers}
    if not words:
        return offers
    shapes = read_said(asked.checkpoint, [f"{name}_shape" for name in words])
    made = {name: _offer(name, each, shapes[f"{name}_shape"], offers, asked) for name, each in words.items()}
    return replace_offers(offers, made)


def _offer(name: str, words: Stored, raw: bytes, offers: Offers, asked: Asked) -> Offer:
    shape = struct.unpack({16: "<2q", 8: "<2i"}.get(len(raw), "<"), raw if len(raw) in (8, 16) else b"")
    scales = find_stored(offers, f"{name}_scale")
    if len(words.shape) != 2 or len(shape) != 2 or scales is None or min(shape) < 1 or shape[0] != words.shape[0]:
        raise refuse(
            asked.checkpoint, f"{name}_packed", f"has shape {list(words.shape)}, and is to be of {list(shape)}"
        )
    rows, columns = shape
    bits = next((bits for bits in (4, 8) if -(-columns * bits // _WORD) == words.shape[1]), None)
    check_numbers(f"{name}_scale", scales, asked.checkpoint)
    across = scales.shape[1] if len(scales.shape) == 2 else 1
    if bits is None or scales.size not in (1, rows * across) or across < 1 or columns % across:
        said = f"has shape {list(words.shape)}, which is not that of {list(shape)} values of 4 or 8 bits"
        raise refuse(asked.checkpoint, f"{name}_packed", f"{said} with scales of {list(scales.shape)}")
    zeros = _find_zeros(name, (rows, across), bits, offers, asked)
    uses = [f"{name}{each}" for each in ("_packed", "_scale", "_shape")]
    if zeros is not None:
        uses.append(f"{name}_zero_point")
    each = _WORD // bits
    expression = Dequantized(
        Codes(words, bits, f"U{bits}-{1 << bits - 1}"),
        Listed(scales),
        (rows, columns),
        find_dtype(asked.checkpoint.config),
        rows,
        columns,
        words.shape[1] * each,
        rows if scales.size == 1 else 1,
        columns // across,
        zeros,
    )
    return make_offer(expression, uses, name, offers)


def _find_zeros(name: str, shape: tuple[int, int], bits: int, offers: Offers, asked: Asked) -> Numbers | None:
    """Return the zero points of a table of scales; None where there are none."""
    zeros, (rows, across) = find_stored(offers, f"{name}_zero_point"), shape
    if zeros is None:
        return None
    each = _WORD // bits
    if zeros.dtype == "I32" and zeros.shape == (-(-rows // each), across):
        return Nibbles(zeros, bits, across, along_rows=True, order=tuple(range(each)), added=-(1 << bits - 1))
    if zeros.dtype == "I8" and zeros.shape == (rows, across):
        return Listed(zeros)
    said = f"is stored as {zeros.dtype} {list(zeros.shape)}, for scales of {[rows, across]}"
    raise refuse(asked.checkpoint, f"{name}_zero_point", said)
