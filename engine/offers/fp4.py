"""FP4 of two values a byte: NVFP4 (a scale in FP8 for 16 values, one for the tensor), and MXFP4 (an exponent for 32).

compressed-tensors stores ``weight_packed``, ``weight_scale`` and, of NVFP4, ``weight_global_scale``, which divides;
ModelOpt ``weight``, ``weight_scale`` and ``weight_scale_2``, which multiplies.
"""

from mergemill.engine.offers.beside import find_dtype, find_stored, make_offer, refuse, replace_offers
from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.dequantized import Codes, Dequantized
from mergemill.engine.tensors.expressions import Stored
from mergemill.engine.tensors.numbers import Listed, Numbers, Scaled

_GROUPS = {"F8_E4M3": 16, "U8": 32, "F8_E8M0": 32}  # values that a scale is of, by its dtype
_SHARED = (("_global_scale", True), ("_scale_2", False))  # of the whole tensor, and whether it divides


def offer_fp4(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, with values and scales as one."""
    made: dict[str, Offer] = {}
    for stored in offers:
        name = stored.removesuffix("_packed")
        values, scales = find_stored(offers, stored), find_stored(offers, f"{name}_scale")
        if values is None or scales is None or values.dtype != "U8" or scales.dtype not in _GROUPS:
            continue
        uses, numbers = [stored, f"{name}_scale"], _share(name, scales, offers, asked)
        uses += [f"{name}{ending}" for ending, _ in _SHARED if f"{name}{ending}" in offers]
        group = _GROUPS[scales.dtype]
        if (
            len(values.shape) < 2
            or not values.size
            or values.shape[-1] * 2 % group
            or scales.shape != (*values.shape[:-1], values.shape[-1] * 2 // group)
        ):
            said = f"has shape {list(scales.shape)}, which is no scale of {group} values of {list(values.shape)} bytes"
            raise refuse(asked.checkpoint, f"{name}_scale", said)
        shape = (*values.shape[:-1], 2 * values.shape[-1])
        rows, columns = shape[-2:]
        expression = Dequantized(
            Codes(values, 4, "E2M1"),
            numbers,
            shape,
            find_dtype(asked.checkpoint.config),
            rows,
            columns,
            columns,
            1,
            group,
        )
        made[name] = make_offer(expression, uses, name, offers)
    return replace_offers(offers, made) if made else offers


def _share(name: str, scales: Stored, offers: Offers, asked: Asked) -> Numbers:
    """Return the scales with the tensor's own, which NVFP4 has and MXFP4 has not."""
    numbers: Numbers = Listed(scales, exponents=scales.dtype == "U8")
    found = [(ending, divides) for ending, divides in _SHARED if f"{name}{ending}" in offers]
    if len(found) != (scales.dtype == "F8_E4M3"):
        raise refuse(
            asked.checkpoint, f"{name}_scale", f"is stored as {scales.dtype}, with {len(found)} scales of the tensor"
        )
    for ending, divides in found:
        shared = find_stored(offers, f"{name}{ending}")
        if shared is None or shared.size != 1 or shared.dtype not in ("F32", "BF16", "F16"):
            raise refuse(asked.checkpoint, f"{name}{ending}", "is no scale of one tensor")
        numbers = Scaled(numbers, shared, divides)
    return numbers
