"""Each model alone: what a cocktail's weights are made of."""

from collections.abc import Sequence

from mergemill.engine.search.strategies.asking import Asking
from mergemill.engine.search.strategies.soup import MODELS


def ask_alone(models: Sequence[str]) -> Asking:
    """Ask for each model as it is."""
    yield [{MODELS: (model,)} for model in models]
    return "models"
