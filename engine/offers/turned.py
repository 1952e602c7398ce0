"""Packed experts ``[in, out]`` against experts one by one ``[out, in]``: so gpt-oss, and what Unsloth makes of it.

gpt-oss packs its experts as ``experts.gate_up_proj [E, in, 2·inner]``, gate and up interleaved, and
``experts.down_proj [E, inner, out]``; Unsloth's checkpoints of it (seen 2026-11-30) store a linear layer an expert,
``experts.gate_up_projs.3.weight [2·inner, in]``, interleaved as before, each with its bias, and the router one module
deeper. Which families have such a second layout, and under which names, their data say (`turned`), never shapes.

llm-compressor's (2026-11-30) has a module an expert, ``experts.3.gate_proj``, ``up_proj`` and ``down_proj``, so that
gate and up lie apart. They are interleaved where the donor packs its experts; the reverse is refused.

Where models of a merge differ, all are given the orientation of the donor; what is packed is then as `layouts.py` says.
"""

from collections.abc import Mapping, Sequence

from mergemill.engine.checkpoint.family import Family, Layout
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.tensors.dtypes import is_mergeable


def turn_experts(offers: Mapping[str, Offers], donor: str, family: Family) -> Mapping[str, Offers]:
    """Return the offers with experts turned as the donor has them, for layouts that are turned in the family.

    Raises PlanError where they are interleaved in one model, and the donor has them apart.
    """
    made = {model: dict(found) for model, found in offers.items()}
    for layout in family.turned:
        packed = {model: _find_packed(found, layout) for model, found in made.items()}
        separate = {model: _find_separate(found, layout) for model, found in made.items()}
        if not any(packed.values()) or not any(separate.values()):
            continue
        if not packed[donor] and len(layout.parts) > 1:
            raise _refuse(donor, separate[donor], packed)
        for model, found in made.items():
            if packed[donor]:
                _pack(found, separate[model], len(layout.parts))
            else:
                _turn(found, packed[model])
    return made


def _refuse(donor: str, separate: Mapping[str, Sequence[str]], packed: Mapping[str, Sequence[str]]) -> PlanError:
    model, names = next((model, names) for model, names in packed.items() if names)
    own = next((names[0] for names in separate.values()), "no such tensor")
    return PlanError(
        f"{donor}: its experts lie one by one, gate and up apart ({own}), and {model} has them packed and interleaved "
        f"({names[0]}); the output would have the layout of {donor}, in which packed ones are not taken apart: give "
        f"{model} as base_model, or first, and the others are packed as it is"
    )


def _find_packed(offers: Offers, layout: Layout) -> list[str]:
    axes = 3 if layout.parts[0].endswith("weight") else 2
    return [name for name in offers if f".{name}".endswith(f".{layout.whole}") and len(offers[name].shape) == axes]


def _find_separate(offers: Offers, layout: Layout) -> Mapping[str, Sequence[str]]:
    """Return the parts of each packed tensor that a model does not have, expert by expert."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for place, part in enumerate(layout.parts):
        begin, end = part.split("#")
        for name in offers:
            stem, cut, rest = f".{name}".rpartition(f".{begin}")
            number = rest.removesuffix(end)
            if cut and rest.endswith(end) and number.isdecimal() and len(number) < 7:
                found.setdefault(f"{stem}.{layout.whole}"[1:], {})[int(number), place] = name
    whole = {packed: [own[key] for key in sorted(own)] for packed, own in found.items() if _is_whole(own, layout)}
    return {packed: names for packed, names in whole.items() if _are_alike([offers[name] for name in names])}


def _is_whole(own: Mapping[tuple[int, int], str], layout: Layout) -> bool:
    return len(own) == (max(own)[0] + 1) * len(layout.parts)


def _are_alike(offers: Sequence[Offer]) -> bool:
    first = offers[0].shape
    plain = all(is_mergeable(offer.dtype) and offer.expression.count_rounds() == (0, 0) for offer in offers)
    return plain and len(first) in (1, 2) and all(offer.shape == first for offer in offers)


def _pack(made: dict[str, Offer], separate: Mapping[str, Sequence[str]], each: int) -> None:
    """Put packed tensors in the place of their parts, of which an expert has so many: ``[in, out · each]``."""
    from mergemill.engine.tensors.permuted import Permuted  # which only such models need
    from mergemill.engine.tensors.stacked import stack

    for packed, names in separate.items():
        found = [made.pop(name) for name in names]
        shape = found[0].shape
        order = tuple(range(len(shape) + (each > 1)))[::-1]
        parts = [offer.expression for offer in found]
        if each > 1:
            parts = [stack(parts[i : i + each], (each, *shape)) for i in range(0, len(parts), each)]
        turned = [Permuted(part, order) if len(order) > 1 else part for part in parts]
        uses = tuple(use for offer in found for use in offer.uses)
        own = (*shape[1:], shape[0] * each)
        made[packed] = Offer(stack(turned, (len(parts), *own)), uses, matched=names[0])


def _turn(made: dict[str, Offer], packed: Sequence[str]) -> None:
    from mergemill.engine.tensors.permuted import Permuted

    for name in packed:
        if len(made[name].shape) == 3:
            made[name] = Offer(Permuted(made[name].expression, (0, 2, 1)), made[name].uses, matched=made[name].matched)
