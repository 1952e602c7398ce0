"""Task vectors: which model each is taken from, the base model or one that its entry names (`delta_base`)."""

from collections.abc import Iterator, Mapping, Sequence

from mergemill.engine.errors import PlanError
from mergemill.engine.methods.contract import Method
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.slots import Candidate, Slot
from mergemill.engine.plan.stacks import Stack
from mergemill.engine.recipe import ModelRef
from mergemill.engine.tensors.dtypes import is_mergeable
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.merged import Difference

Vectors = dict[tuple[str, str | None, int], int]  # (model, its delta_base, which of several such) -> number


def list_vectors(stacks: Sequence[Stack]) -> Vectors:
    """Return the numbers of the merge's task vectors, in the recipe's order.

    A model has one over all slices; where it is several of the sources of one slice, as many.
    """
    vectors: Vectors = {}
    for stack in stacks:
        for stretch in stack.stretches:
            own = [source for source in stretch.sources if str(source.model) != stretch.base]
            named = [(str(source.model), _name(source.delta_base)) for source in own]
            for key in _count_up(named):
                vectors.setdefault(key, len(vectors))
    return vectors


def find_numbers(vectors: Vectors, candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Return which of the merge's task vectors those of one tensor are."""
    return tuple(vectors[key] for key in _count_up([(each.model, each.delta_base) for each in candidates]))


def _count_up(named: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, str | None, int]]:
    for i, (model, delta_base) in enumerate(named):
        yield model, delta_base, named[:i].count((model, delta_base))


def _name(model: ModelRef | None) -> str | None:
    return None if model is None else str(model)


def check_delta_bases(stacks: Sequence[Stack], method: Method, *, where: str) -> None:
    """Refuse a model's delta_base where no task vector is taken of it."""
    for stack in stacks:
        for stretch in stack.stretches:
            for source in stretch.sources:
                if source.delta_base is None:
                    continue
                if not has_vectors(method, stretch.base):
                    raise PlanError(
                        f"{where}: {method.name} takes no task vector of {source.model} here; "
                        f"delta_base is for methods with a base model"
                    )
                if str(source.model) == stretch.base:
                    raise PlanError(
                        f"{where}: the base model {source.model} has no task vector; leave its delta_base out"
                    )


def has_vectors(method: Method, base: str | None) -> bool:
    """Whether the method is given task vectors where the base model is `base`."""
    return method.takes_deltas and (method.base == "required" or (method.base == "optional" and base is not None))


def find_delta_base(
    slot: Slot, candidate: Candidate, offer: Offer, offers: Mapping[str, Offers], *, where: str
) -> Offer | None:
    """Return what a candidate's task vector is taken from; None where that is the base model's tensor."""
    model = candidate.delta_base
    if model is None or model == slot.base:
        return None
    found = offers[model].get(candidate.tensor)
    if found is None:
        raise PlanError(f"{where}: tensor {candidate.tensor} is in {candidate.model} but not in its delta_base {model}")
    if found.shape != offer.shape or not is_mergeable(found.dtype):
        raise PlanError(
            f"{where}: tensor {candidate.tensor}: {candidate.model} has shape {list(offer.shape)}, its delta_base "
            f"{model} {list(found.shape)} as {found.dtype}; a task vector needs two floating tensors of one shape"
        )
    return found


def make_source(offer: Offer, delta_base: Offer | None) -> Expression:
    """Return an input of a method: what a model offers, or its difference to a base of its own."""
    return offer.expression if delta_base is None else Difference(offer.expression, delta_base.expression)


def enter_delta_bases(
    slot: Slot,
    found: Sequence[tuple[Candidate, Offer]],
    unused: str | None,
    offers: Mapping[str, Offers],
    ledger: Ledger,
) -> None:
    """Enter into the ledger what becomes of the tensors that task vectors are taken from.

    unused: the rule by which they are not read; None where they are.
    """
    for candidate, _ in found:
        model = candidate.delta_base
        if model is None or model == slot.base or candidate.tensor not in offers[model]:
            continue
        for name in offers[model][candidate.tensor].uses:
            if unused is None:
                ledger.use(model, name, "merged")
            else:
                ledger.drop(model, name, unused)
