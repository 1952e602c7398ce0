"""Tied tensors: where a model stores none of a name that others have, the one that it uses instead stands for it."""

from mergemill.engine.checkpoint.family import find_ties
from mergemill.engine.offers.offer import Asked, Offers


def offer_ties(offers: Offers, asked: Asked) -> Offers:
    """Return the offers, and those of tied tensors under the names of what they stand for."""
    ties = find_ties([name for name in asked.names if name not in offers], offers, asked.family)
    return {**offers, **{name: offers[tie] for name, tie in ties.items()}}
