"""Policy: which tensors of the output are not merged, but copied from one model, or left out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mergemill.engine.errors import PlanError
from mergemill.engine.offers.offer import Offers
from mergemill.engine.recipe import Policy, Recipe

DROPPED = "left out by policy"
NOT_COPIED = "copied from another model by policy"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one tensor of the output."""

    action: Literal["merge", "copy", "drop"]
    model: str = ""  # that it is copied from


@dataclass(frozen=True, slots=True)
class Policies:
    """The recipe's policies; the first that matches a name holds."""

    rules: tuple[Policy, ...]
    donor: str

    def find(self, name: str) -> Verdict:
        """Return what becomes of the output tensor of this name."""
        rule = next((rule for rule in self.rules if rule.matches(name)), None)
        if rule is None or rule.action == "merge":
            return Verdict("merge")
        if rule.action == "drop":
            return Verdict("drop")
        return Verdict("copy", self.donor if rule.model is None else str(rule.model))

    def find_unmerged(self, offers: Offers) -> Iterator[tuple[str, str]]:
        """Yield the names that are not merged, and the rule by which a model's own are not used."""
        for name in offers if self.rules else ():
            action = self.find(name).action
            if action != "merge":
                yield name, DROPPED if action == "drop" else NOT_COPIED


MERGE_ALL = Policies((), "")


def make_policies(recipe: Recipe, donor: str, models: Sequence[str], *, where: str) -> Policies:
    """Return the recipe's policies; `PlanError` where one copies from a model that the recipe does not merge."""
    for rule in recipe.policy or ():
        if rule.model is not None and str(rule.model) not in models:
            raise PlanError(
                f"{where}: policy: {rule.model} is none of the recipe's models, which are {', '.join(models)}; "
                f"list it among them, or copy from one of these"
            )
    return Policies(recipe.policy or (), donor)


def warn_of_policies(policies: Policies, offers: Mapping[str, Offers], *, where: str) -> Iterator[str]:
    """Yield a warning for each policy that matches no name."""
    names = dict.fromkeys(name for found in offers.values() for name in found) if policies.rules else {}
    for rule in policies.rules:
        if not any(rule.matches(name) for name in names):
            yield f"{where}: policy: the filter {rule.filter!r} matches no tensor; it does nothing here"
