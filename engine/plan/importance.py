"""Importances: checkpoints beside models that say how much each of their weights matters, tensor by tensor.

An importance has a tensor under the name of each of the model's: for `fisher` of the same shape, for `regmean` the Gram
matrix of the inputs of a linear layer ``[n, n]``, under the name of its weight ``[m, n]`` or of its module. They are no
models: they need no config, and what of them nothing asks for is left aside.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mergemill.engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergemill.engine.checkpoint.family import Family
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.contract import Method
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.names import unwrap_names
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.slots import Candidate
from mergemill.engine.plan.values import SourceUse
from mergemill.engine.recipe import ModelEntry, ModelRef, Module, Recipe, Source
from mergemill.engine.storage.store import Storage
from mergemill.engine.tensors.dtypes import is_mergeable, item_bytes
from mergemill.engine.tensors.expressions import Expression

NOT_ASKED = "importance that nothing asks for"


@dataclass(frozen=True, slots=True)
class OpenImportances:
    """The importances of a merge, open; none where its recipe has none."""

    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)  # by the reference as text
    offers: Mapping[str, Offers] = field(default_factory=dict)
    where: str = ""  # the recipe's name, for errors

    def find(
        self, found: Sequence[tuple[Candidate, Offer]], method: Method, tensor: str, ledger: Ledger
    ) -> tuple[Expression, ...]:
        """Return the importance of each of a method's inputs; none where the method, or this tensor, has none.

        `PlanError` where one lacks it or does not fit.
        """
        if not self.checkpoints:
            return ()
        shape = found[0][1].shape
        if method.takes_matrices and len(shape) != 2:
            return ()
        each = [self._find_offer(candidate, offer) for candidate, offer in found]
        if method.takes_matrices and not any(offer for _, offer in each):
            return ()
        wanted = (shape[1], shape[1]) if method.takes_matrices else shape
        taken = [
            self._take(candidate, name, offer, shape, wanted, tensor, ledger)
            for (candidate, _), (name, offer) in zip(found, each, strict=True)
        ]
        if not method.takes_matrices:
            return tuple(taken)
        from mergemill.engine.methods.regmean import GRAMS  # which a plain merge has no need of
        from mergemill.engine.tensors.goes_with import GoesWith

        scratch_bytes = [GRAMS * item_bytes("F64") * shape[1] ** 2, *(0 for _ in taken[1:])]
        return tuple(GoesWith(gram, shape, own_bytes) for gram, own_bytes in zip(taken, scratch_bytes, strict=True))

    def close(self, ledger: Ledger) -> tuple[SourceUse, ...]:
        """Return what the merge takes of each."""
        for model, checkpoint in self.checkpoints.items():
            ledger.drop_all(model, checkpoint.tensors, NOT_ASKED)
        return ledger.summarise(self.checkpoints)

    def _find_offer(self, candidate: Candidate, offer: Offer) -> tuple[str, Offer | None]:
        """Return the name under which an importance is found, and it."""
        if candidate.importance is None:
            raise PlanError(
                f"{self.where}: {candidate.model} has no importance, and other models have; give one beside every "
                f"model, or none"
            )
        offers = self.offers[candidate.importance]
        names = (candidate.tensor, candidate.tensor.removesuffix(".weight"), *offer.uses[:1])
        return next(((name, offers[name]) for name in names if name in offers), (candidate.tensor, None))

    def _take(
        self,
        candidate: Candidate,
        name: str,
        offer: Offer | None,
        shape: tuple[int, ...],
        wanted: tuple[int, ...],
        tensor: str,
        ledger: Ledger,
    ) -> Expression:
        importance = str(candidate.importance)
        if offer is None:
            raise PlanError(
                f"{self.where}: tensor {name} is in {candidate.model} but not in its importance {importance}"
            )
        if offer.shape != wanted or not is_mergeable(offer.dtype):
            hint = " (the Gram matrix of its inputs)" if wanted != shape else ""
            raise PlanError(
                f"{self.where}: tensor {tensor}: {candidate.model} has shape {list(shape)}, and its importance "
                f"{importance} {list(offer.shape)} as {offer.dtype}; it must be floating, of shape {list(wanted)}{hint}"
            )
        for used in offer.uses:
            ledger.use(importance, used, "merged")
        return offer.expression


def open_importances(
    recipe: Recipe, method: Method, family: Family, storage: Storage, *, where: str
) -> OpenImportances:
    """Open the importances of a recipe; `PlanError` where its method takes none."""
    refs = {str(ref): ref for ref in _iter_importances(recipe)}
    if not refs:
        return OpenImportances()
    if not method.takes_importances:
        raise PlanError(
            f"{where}: {method.name} takes no importance; choose fisher, for importances of elements, or regmean, for "
            f"Gram matrices, or leave importance out"
        )
    for name, ref in refs.items():
        if ref.list_adapters():
            raise PlanError(f"{where}: importance {name}: an importance has no adapter")
    opened = {name: open_checkpoint(ref.path, ref.revision, storage) for name, ref in refs.items()}
    named = unwrap_names(opened)
    return OpenImportances(named, open_offers(named, family, {}), where)


def warn_of_importance(recipe: Recipe, method: Method, *, where: str) -> Iterator[str]:
    """Yield a warning where a method that weighs by importances has none."""
    if method.takes_importances and not any(True for _ in _iter_importances(recipe)):
        yield f"{where}: no model has an importance, so {method.name} is linear"


def _iter_importances(recipe: Recipe) -> Iterator[ModelRef]:
    stacks: list[Recipe | Module] = [recipe, *(recipe.modules or {}).values()]
    entries: list[ModelEntry | Source] = [entry for each in stacks for entry in each.models or ()]
    entries += [source for each in stacks for part in each.slices or () for source in part.sources]
    return (entry.importance.model for entry in entries if entry.importance is not None)
