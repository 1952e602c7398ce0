"""Weights that a recipe says are stored transposed in one of its models: Conv1D ``[in, out]`` against Linear.

No family has both under one name (GPT-2's weights are Conv1D wherever they are called so), and of square matrices no
shape tells. So what a user's own conversion turned round, the recipe says, and nothing is guessed (2026-11-30).
"""

from collections.abc import Mapping

from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.recipe import Recipe


def turn_given(recipe: Recipe, offers: Mapping[str, Offers], donor: str, *, where: str) -> Mapping[str, Offers]:
    """Return the offers with those matrices turned to the donor's orientation that `transposed` names.

    `PlanError` for a rule of the donor, of no model of the recipe, or one that matches no matrix of its model.
    """
    made = dict(offers)
    turned: dict[str, set[str]] = {}
    for rule in recipe.transposed or ():
        model = str(rule.model)
        if model not in offers:
            raise PlanError(
                f"{where}: transposed: {model} is none of the recipe's models, which are {', '.join(offers)}"
            )
        if model == donor:
            raise PlanError(
                f"{where}: transposed: {model} is the donor, whose layout the output has; name the models that differ "
                f"from it"
            )
        names = [name for name, offer in offers[model].items() if len(offer.shape) == 2 and rule.matches(name)]
        if not names:
            raise PlanError(
                f"{where}: transposed: the filter {rule.filter!r} matches no matrix of {model}; `mergemill inspect "
                f"{model} --tensors` shows the names"
            )
        turned.setdefault(model, set()).update(names)
    for model, chosen in turned.items():
        made[model] = {name: _turn(offer) if name in chosen else offer for name, offer in offers[model].items()}
    return made


def _turn(offer: Offer) -> Offer:
    from mergemill.engine.tensors.permuted import Permuted  # which few merges need

    return Offer(Permuted(offer.expression, (1, 0)), offer.uses, matched=offer.matched)
