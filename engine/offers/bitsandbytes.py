"""bitsandbytes: NF4 and FP4 (values of 4 bits of a table, with scales that may be quantised themselves), and LLM.int8.

Of 4 bits, ``weight.quant_state.bitsandbytes__nf4`` is JSON: shape and sizes of blocks stand nowhere else, so the plan
reads it, a hundred bytes for each weight. Of LLM.int8, ``SCB`` is the largest magnitude of each row, which 127 is.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from mergemill.engine.offers.beside import find_dtype, find_stored, make_offer, read_said, refuse, replace_offers
from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.dequantized import Codes, Dequantized
from mergemill.engine.tensors.expressions import Stored
from mergemill.engine.tensors.numbers import Listed, Nested, Numbers

_STATE = ".quant_state.bitsandbytes__"
_STORED = {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}
_PER_127 = 7.874015718698502e-3  # as bitsandbytes has 1 / 127
_ROWS = b"\0"  # of `weight_format`: as they are


def offer_bitsandbytes(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, with values and scales as one."""
    states = {name: name.partition(_STATE)[0] for name in offers if _STATE in name}
    made = {}
    if states:
        said = read_said(asked.checkpoint, list(states))
        made = {name: _offer_4bit(name, state, said[state], offers, asked) for state, name in states.items()}
    for scb in (name for name in offers if name.endswith(".SCB")):
        name = f"{scb.removesuffix('.SCB')}.weight"
        values = find_stored(offers, name)
        if values is not None and values.dtype == "I8":
            made[name] = _offer_int8(name, offers, asked)
    return replace_offers(offers, made) if made else offers


def _offer_int8(name: str, offers: Offers, asked: Asked) -> Offer:
    stem = name.removesuffix(".weight")
    values, scales, form = find_stored(offers, name), find_stored(offers, f"{stem}.SCB"), f"{stem}.weight_format"
    if values is None or scales is None or len(values.shape) != 2 or not values.size or scales.dtype != "F32":
        raise refuse(asked.checkpoint, name, "or its SCB is not what LLM.int8 stores")
    rows, columns = values.shape
    if scales.size != rows:
        raise refuse(asked.checkpoint, f"{stem}.SCB", f"has {scales.size} scales for {rows} rows")
    uses = [name, f"{stem}.SCB"]
    if form in offers:
        if read_said(asked.checkpoint, [form])[form] != _ROWS:
            raise refuse(asked.checkpoint, form, "names another order of values than that of rows")
        uses.append(form)
    expression = Dequantized(
        Codes(values, 8, "I8"),
        Listed(scales),
        values.shape,
        find_dtype(asked.checkpoint.config),
        rows,
        columns,
        columns,
        1,
        columns,
        factor=_PER_127,
    )
    return make_offer(expression, uses, name, offers)


def _offer_4bit(name: str, state: str, raw: bytes, offers: Offers, asked: Asked) -> Offer:
    said = _parse(state, raw, asked)
    beside = {each: find_stored(offers, f"{name}.{each}") for each in _STORED}
    values, table = find_stored(offers, name), beside["quant_map"]
    shape, block = tuple(said["shape"]), said["blocksize"]
    size = math.prod(shape)
    blocks = -(-size // block)
    scales = beside["absmax"]
    if (
        values is None
        or scales is None
        or values.dtype != "U8"
        or values.size != -(-size // 2)
        or scales.size != blocks
    ):
        raise refuse(
            asked.checkpoint, state, f"says {list(shape)} values in blocks of {block}, which are not beside it"
        )
    if table is None or table.dtype != "F32" or table.size != 16:
        raise refuse(asked.checkpoint, f"{name}.quant_map", "is no table of 16 values")
    numbers: Numbers = Listed(scales)
    if scales.dtype == "U8":
        numbers = _nest(state, scales, said, beside, asked)
    elif scales.dtype not in ("F32", "BF16", "F16"):
        raise refuse(asked.checkpoint, f"{name}.absmax", f"is stored as {scales.dtype}")
    expression = Dequantized(
        Codes(values, 4, table, high_first=True),
        numbers,
        shape,
        find_dtype(asked.checkpoint.config),
        blocks,
        block,
        block,
        1,
        block,
    )
    uses = [name, state, *(f"{name}.{each}" for each in sorted(_STORED) if beside[each] is not None)]
    return make_offer(expression, uses, name, offers)


def _nest(
    state: str, scales: Stored, said: Mapping[str, Any], beside: Mapping[str, Stored | None], asked: Asked
) -> Numbers:
    """Return scales that are quantised themselves."""
    nested, table = beside["nested_absmax"], beside["nested_quant_map"]
    each, offset = said.get("nested_blocksize"), said.get("nested_offset")
    if type(each) is int and each > 0 and isinstance(offset, float) and nested is not None and table is not None:
        stored = (nested.dtype, nested.size, table.dtype, table.size)
        if stored == ("F32", -(-scales.size // each), "F32", 256):
            return Nested(scales, table, nested, each, offset)
    raise refuse(asked.checkpoint, state, "does not say how the scales beside it are quantised themselves")


def _parse(state: str, raw: bytes, asked: Asked) -> dict[str, Any]:
    """Return what a state says; `PlanError` where it does not say a shape and a size of blocks."""
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise refuse(asked.checkpoint, state, "is not JSON")
    shape, block = said.get("shape"), said.get("blocksize")
    if not isinstance(shape, list) or not all(type(each) is int and 0 < each < 1 << 40 for each in shape) or not shape:
        raise refuse(asked.checkpoint, state, "says no shape")
    if type(block) is not int or block < 2 or block & (block - 1):
        raise refuse(asked.checkpoint, state, "says no size of blocks that is a power of 2")
    return said
