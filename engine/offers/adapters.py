"""Adapters: a weight and what adapters change in it are one expression, evaluated slab by slab."""

from collections.abc import Callable, Sequence
from typing import cast

from mergemill.engine.checkpoint.changes import Packed, Product, Replacement, Residual, Shift, find_parts
from mergemill.engine.offers.offer import Asked, Offer, Offers
from mergemill.engine.tensors.adapted import ColumnMagnitudes, RowMagnitudes, Shifted, TokenRows
from mergemill.engine.tensors.expressions import Expression, Leaf
from mergemill.engine.tensors.low_rank import Factor, LowRank


def offer_adapted(offers: Offers, asked: Asked) -> Offers:
    """Return the offers with the changes of adapters made, and without what these are made of."""
    changes = asked.checkpoint.changes
    if not changes:
        return offers
    made = dict(offers)
    names = {old: new for new, old in asked.checkpoint.called.items()}  # since the adapters were put on
    for change in changes:
        name, parts = names.get(change.tensor, change.tensor), [names.get(part, part) for part in find_parts(change)]
        if isinstance(change, Packed):
            made[name] = _pack([made[part] for part in parts], change.shape)
            for part in parts:
                del made[part]
            continue
        expression = _change(
            change, made[name].expression, lambda part: cast(Leaf, offers[names.get(part, part)].expression)
        )
        made[name] = Offer(expression, (*made[name].uses, *parts))
        for part in parts:
            made.pop(part, None)
    return made


def _pack(offers: Sequence[Offer], shape: tuple[int, ...]) -> Offer:
    from mergemill.engine.tensors.stacked import stack  # which few adapters need

    uses = tuple(dict.fromkeys(use for offer in offers for use in offer.uses))
    return Offer(stack([offer.expression for offer in offers], shape), uses)


def _change(
    change: Product | Residual | Shift | Replacement, weight: Expression, find: Callable[[str], Leaf]
) -> Expression:
    if isinstance(change, Residual):
        from mergemill.engine.tensors.residual import ResidualWeight  # which few adapters need

        return ResidualWeight(weight, change.beginning, change.rank, change.scale)
    if isinstance(change, Shift):
        return Shifted(weight, find(change.added), change.scale)
    if isinstance(change, Replacement):
        return TokenRows(weight, find(change.rows), change.tokens)
    return _add_product(change, weight, find)


def _add_product(change: Product, weight: Expression, find: Callable[[str], Leaf]) -> Expression:
    left, right = find(change.left), find(change.right)
    if change.places is not None:
        factors = Factor(left, *change.places[0]), Factor(right, *change.places[1])
    elif change.transposed:
        factors = Factor(left, 1, change.rows), Factor(right, change.rank, 1)
    else:
        factors = Factor(left, change.rank, 1), Factor(right, 1, change.columns)
    made = LowRank(weight, *factors, change.rank, change.scale, change.rows, change.columns)
    if change.magnitude is None:
        return made
    kind = ColumnMagnitudes if change.transposed else RowMagnitudes
    return kind(made, find(change.magnitude), change.columns)
