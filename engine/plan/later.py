"""Models of which only some predict later tokens (MTP): the output then has nothing that does, and says so.

Decided on 2026-11-29: a head for later tokens was trained beside the weights of its own model, so one model's would
serve a merge badly, and a loader refuses one whose config asks for it and finds none.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family, is_later
from mergemill.engine.checkpoint.later import list_layers_beyond, list_named_later
from mergemill.engine.offers.offer import Offers, find_by_names
from mergemill.engine.plan.coverage import LATER_UNUSED, Ledger
from mergemill.engine.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Later:
    """What of the models is left out, since it predicts later tokens."""

    names: Mapping[str, frozenset[str]]  # by model
    sliced: bool

    def leave_out(self, offers: Mapping[str, Offers]) -> dict[str, Offers]:
        """Return the offers without it."""
        return {
            model: {name: offer for name, offer in found.items() if name not in self.names[model]}
            for model, found in offers.items()
        }

    def enter(self, checkpoints: Mapping[str, Checkpoint], ledger: Ledger) -> None:
        """Note each tensor that is left out."""
        for model, names in self.names.items():
            ledger.drop_all(model, names & checkpoints[model].tensors.keys(), LATER_UNUSED)

    def warn(self, where: str) -> list[str]:
        """Return a warning where whole models are merged without it."""
        have = [model for model, names in self.names.items() if names]
        if self.sliced or not have:
            return []
        others = ", ".join(model for model in self.names if model not in have) or "not all in the same way"
        return [
            f"{where}: what predicts later tokens (MTP) is in {', '.join(have)}, and not in {others}; "
            f"the output has nothing of it, and its config says so"
        ]


def find_later(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], offers: Mapping[str, Offers], family: Family
) -> Later:
    """Return what is left out: of slices what is no layer by its name, of whole models what not all have."""
    modules = (recipe.modules or {}).values()
    if recipe.slices is not None or any(module.slices is not None for module in modules):
        return Later(
            {model: frozenset(n for n in names if is_later(n, family)) for model, names in offers.items()}, True
        )
    named = find_by_names(offers, functools.partial(list_named_later, family=family))
    found = {
        model: named[model] | list_layers_beyond(names, checkpoints[model].config, family)
        for model, names in offers.items()
    }
    same = len(set(found.values())) == 1
    return Later(dict.fromkeys(found, frozenset()) if same else found, False)
