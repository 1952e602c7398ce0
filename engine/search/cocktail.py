"""LM-Cocktail: models averaged with weights that follow from their losses on a few examples.

Source: Xiao et al., "LM-Cocktail", arXiv:2311.13534, sections 3.2 and 3.3; the temperature 5 is that of its code.
"""

import math
from collections.abc import Sequence
from typing import Any

from mergemill.engine.recipe import ModelRef

TEMPERATURE, ALPHA = 5.0, 0.5
TEMPERATURES = (0.1, 1.0, 5.0)  # whose weights are shown beside


def find_weights(losses: Sequence[float], temperature: float) -> list[float]:
    """Return ``exp(-loss[i] / temperature)``, divided by the sum of it over all.

    >>> [round(weight, 4) for weight in find_weights([2.0, 2.5], 5.0)]
    [0.525, 0.475]
    """
    least = min(losses)
    shares = [math.exp((least - loss) / temperature) for loss in losses]
    return [share / math.fsum(shares) for share in shares]


def make_cocktail(
    models: Sequence[ModelRef], weights: Sequence[float], target: ModelRef | None, alpha: float
) -> dict[str, Any]:
    """Return the recipe of ``alpha * target + (1 - alpha) * sum(weights[i] * models[i])``.

    Without a target it is the sum alone.
    """
    shares: dict[ModelRef, float] = {}
    if target is not None:
        shares[target] = alpha
    for model, weight in zip(models, weights, strict=True):
        shares[model] = shares.get(model, 0.0) + (weight if target is None else (1 - alpha) * weight)
    entries = [
        {"model": model.model_dump(mode="json"), "parameters": {"weight": share}} for model, share in shares.items()
    ]
    return {"merge_method": "linear", "models": entries, "parameters": {"normalize": False}}
