"""Task vectors: which model each is taken from, the base model or one that its entry names (`delta_base`)."""

from collections.abc import Sequence

from mergemill.engine.checkpoint.checkpoint import StoredTensor
from mergemill.engine.checkpoint.family import Family, find_tie
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.coverage import VECTOR_UNUSED, Ledger
from mergemill.engine.plan.slots import Candidate, Checkpoints, Slot, Stack
from mergemill.engine.tensors.dtypes import is_mergeable
from mergemill.engine.tensors.expressions import Difference, Expression, Merged, Stored

Vectors = dict[tuple[str, str | None], int]  # (model, its delta_base) -> number


def list_vectors(stacks: Sequence[Stack]) -> Vectors:
    """Return the numbers of the merge's task vectors, in the recipe's order."""
    vectors: Vectors = {}
    for stack in stacks:
        for stretch in stack.stretches:
            for source in stretch.sources:
                if str(source.model) != stretch.base:
                    delta_base = None if source.delta_base is None else str(source.delta_base)
                    vectors.setdefault((str(source.model), delta_base), len(vectors))
    return vectors


def find_delta_base(
    slot: Slot, candidate: Candidate, stored: StoredTensor, checkpoints: Checkpoints, family: Family, *, where: str
) -> StoredTensor | None:
    """Return what a candidate's task vector is taken from; None where that is the base model's tensor."""
    model = candidate.delta_base
    if model is None or model == slot.base:
        return None
    if candidate.model == slot.base:
        raise PlanError(f"{where}: the base model {candidate.model} has no task vector; leave its delta_base out")
    tensors = checkpoints[model].tensors
    name = candidate.tensor if candidate.tensor in tensors else find_tie(candidate.tensor, tensors, family)
    if name is None:
        raise PlanError(f"{where}: tensor {candidate.tensor} is in {candidate.model} but not in its delta_base {model}")
    found = tensors[name]
    if found.shape != stored.shape or not is_mergeable(found.dtype):
        raise PlanError(
            f"{where}: tensor {candidate.tensor}: {candidate.model} has shape {list(stored.shape)}, its delta_base "
            f"{model} {list(found.shape)} as {found.dtype}; a task vector needs two floating tensors of one shape"
        )
    return found


def make_source(stored: StoredTensor, delta_base: StoredTensor | None) -> Expression:
    """Return an input of a method: a stored tensor, or its difference to a base of its own."""
    source = make_stored(stored)
    return source if delta_base is None else Difference(source, make_stored(delta_base))


def make_stored(tensor: StoredTensor) -> Stored:
    """Return a stored tensor as an expression."""
    return Stored(tensor.file, tensor.offset_bytes, tensor.dtype, tensor.shape)


def enter_delta_bases(
    slot: Slot, candidates: Sequence[Candidate], expression: Expression, checkpoints: Checkpoints, ledger: Ledger
) -> None:
    """Enter into the ledger what becomes of the tensors that task vectors are taken from."""
    for candidate in candidates:
        model = candidate.delta_base
        if model is None or model == slot.base or candidate.tensor not in checkpoints[model].tensors:
            continue
        if isinstance(expression, Merged):
            ledger.use(model, candidate.tensor, "merged")
        else:
            ledger.drop(model, candidate.tensor, VECTOR_UNUSED)
