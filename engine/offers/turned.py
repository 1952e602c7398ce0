"""Packed experts ``[in, out]`` against experts one by one ``[out, in]``: so gpt-oss, and what Unsloth makes of it.

gpt-oss packs its experts as ``experts.gate_up_proj [E, in, 2·inner]``, gate and up interleaved, and
``experts.down_proj [E, inner, out]``; Unsloth's checkpoints of it (seen 2026-11-30) store a linear layer an expert,
``experts.gate_up_projs.3.weight [2·inner, in]``, interleaved as before, each with its bias, and the router one module
deeper. Which families have such a second layout, and under which names, their data say (`turned`), never shapes.

Where models of a merge differ, all are given the orientation of the donor; what is packed is then as `layouts.py` says.
"""

from collections.abc import Mapping, Sequence

from mergemill.engine.checkpoint.family import Family, Layout
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.tensors.dtypes import is_mergeable


def turn_experts(offers: Mapping[str, Offers], donor: str, family: Family) -> Mapping[str, Offers]:
    """Return the offers with experts turned as the donor has them, for layouts that are turned in the family."""
    made = {model: dict(found) for model, found in offers.items()}
    for layout in family.turned:
        packed = {model: _find_packed(found, layout) for model, found in made.items()}
        separate = {model: _find_separate(found, layout) for model, found in made.items()}
        if any(packed.values()) and any(separate.values()):
            for model, found in made.items():
                if packed[donor]:
                    _pack(found, separate[model])
                else:
                    _turn(found, packed[model])
    return made


def _find_packed(offers: Offers, layout: Layout) -> list[str]:
    return [name for name in offers if f".{name}".endswith(f".{layout.whole}") and len(offers[name].shape) == 3]


def _find_separate(offers: Offers, layout: Layout) -> Mapping[str, Sequence[str]]:
    """Return the experts of each packed tensor that a model does not have, in their order."""
    begin, end = layout.parts[0].split("#")
    found: dict[str, dict[int, str]] = {}
    for name in offers:
        stem, place, rest = f".{name}".rpartition(f".{begin}")
        number = rest.removesuffix(end)
        if place and rest.endswith(end) and number.isdecimal() and len(number) < 7:
            found.setdefault(f"{stem}.{layout.whole}"[1:], {})[int(number)] = name
    whole = {packed: [own[i] for i in sorted(own)] for packed, own in found.items() if max(own) + 1 == len(own)}
    return {packed: names for packed, names in whole.items() if _are_alike([offers[name] for name in names])}


def _are_alike(offers: Sequence[Offer]) -> bool:
    first = offers[0].shape
    plain = all(is_mergeable(offer.dtype) and offer.expression.count_rounds() == (0, 0) for offer in offers)
    return plain and len(first) == 2 and all(offer.shape == first for offer in offers)


def _pack(made: dict[str, Offer], separate: Mapping[str, Sequence[str]]) -> None:
    from mergemill.engine.tensors.permuted import Permuted  # which only such models need
    from mergemill.engine.tensors.stacked import stack

    for packed, names in separate.items():
        found = [made.pop(name) for name in names]
        rows, columns = found[0].shape
        turned = [Permuted(offer.expression, (1, 0)) for offer in found]
        uses = tuple(use for offer in found for use in offer.uses)
        made[packed] = Offer(stack(turned, (len(names), columns, rows)), uses, matched=names[0])


def _turn(made: dict[str, Offer], packed: Sequence[str]) -> None:
    from mergemill.engine.tensors.permuted import Permuted

    for name in packed:
        made[name] = Offer(Permuted(made[name].expression, (0, 2, 1)), made[name].uses, matched=made[name].matched)
