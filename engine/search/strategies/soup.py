"""Greedy soup: models are added to an average, the best first, as long as that does not make it worse.

Source: Wortsman et al., "Model soups", arXiv:2203.05482, recipe 1. That the left-out ones are tried again is ours.
"""

from collections.abc import Sequence

from mergemill.engine.search.strategies.asking import Asking

MODELS = "models"  # the one value of a candidate: which are in it


def ask_soup(models: Sequence[str], rounds: int, kept: list[str]) -> Asking:
    """Ask for each model alone, then for the soup with one more; `kept` holds those of the soup at the end.

    A model is kept where the soup with it is at least as good as without: so of k models at most 2k - 1 candidates are
    asked for in one round.
    """
    ranks = yield [{MODELS: (model,)} for model in models]
    order = order_models(models, ranks)
    kept[:] = order[:1]
    rank = min(ranks)
    for _ in range(rounds):
        before = len(kept)
        for model in [each for each in order if each not in kept]:
            (tried,) = yield [{MODELS: (*kept, model)}]
            if tried <= rank:
                kept.append(model)
                rank = tried
        if len(kept) == before:
            break
    return "soup"


def order_models(models: Sequence[str], ranks: Sequence[float]) -> list[str]:
    """Return the models, the best first.

    >>> order_models(["a", "b", "c"], [2.0, 1.0, 2.0])
    ['b', 'a', 'c']
    """
    return [model for _, _, model in sorted(zip(ranks, range(len(models)), models, strict=True))]
