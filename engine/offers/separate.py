"""Packed experts as tensors of their own, called as the models on the Hub call them."""

from collections.abc import Callable, Mapping

from mergemill.engine.checkpoint.family import Family, is_packed_otherwise
from mergemill.engine.checkpoint.packed_experts import name_experts
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.tensors.excerpt import take_apart


def separate_experts(
    offers: Mapping[str, Offers], family: Family, takes: Callable[[str], bool], *, where: str
) -> Mapping[str, Offers]:
    """Return the offers of all models with their packed experts one by one; `PlanError` where that has no layout.

    takes: whether tensors of this module are asked for.
    """
    return {model: _separate(found, family, takes, where) for model, found in offers.items()}


def _separate(found: Offers, family: Family, takes: Callable[[str], bool], where: str) -> Offers:
    made: dict[str, Offer] = {}
    for name, offer in found.items():
        names = name_experts(name, offer.shape, family)
        if not names or not takes(name.rpartition(".")[0]):
            made[name] = offer
            continue
        if is_packed_otherwise(name, family):
            raise PlanError(
                f"{where}: tensor {name}: experts of this family are packed [in, out], and no layout of them one by "
                f"one is known; leave --layout out, or these with -e 'experts$'"
            )
        if offer.expression.count_rounds() != (0, 0):
            raise PlanError(
                f"{where}: tensor {name}: is made of a merge that sees all of it at once, of which no expert can be "
                f"had alone; merge it first, or leave --layout out"
            )
        parts = take_apart(offer.expression, list(names.values()))
        made |= {part: Offer(made_of, offer.uses) for part, made_of in zip(names, parts, strict=True)}
    return made
