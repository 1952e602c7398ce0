"""RAM+ (tensor-local): RAM, with what one model alone changes amplified by how much it shares.

Source: Yuan et al., "Behavior knowledge merge in reinforced agentic models" (RAM+),
arXiv:2601.13572; the shares are counted for each tensor.

For: as ram, with the elements of one model alone amplified.

Evidence: agents of LLMs (the source).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.methods.changes import drop_unchanged, fuse_changes, mean_of_changes
from mergemill.engine.methods.contract import merge_method
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Gather, Partial, StoredGather, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import StoredSlab

Counts = tuple[int, int]  # of one model's changed elements: those it shares with others, those it has alone


def _amplify_unique(epsilon: float, r: float, alpha: float) -> Generator[Gather, Any, tuple[float, ...]]:
    """Find for each model the factor on what it alone changes: ``1 + r · clip(shared / unique, 0, alpha)``."""
    counts = yield _CountingChanges(epsilon)
    return tuple(1 + r * min(shared / max(unique, epsilon), alpha) if unique else 1.0 for shared, unique in counts)


def _fuse(statistics: Sequence[float], epsilon: float) -> Fusion:
    return fuse_changes([factor - 1 for factor in statistics], epsilon)


@merge_method(reads="sums", base="required", statistics=_amplify_unique, rounds=1, fused=_fuse)
def ramplus_tl(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Sequence[float],
    *,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
) -> Tensor:
    """Return the base plus the mean of the deltas larger than `epsilon`, amplified where only one of them is.

    Shapes: all ``[n]``.
    """
    count = drop_unchanged(deltas, epsilon)
    unique, factors = torch.eq(count, 1, out=torch.empty_like(count)), torch.empty_like(count)
    for delta, factor in zip(deltas, statistics, strict=True):
        delta.mul_(torch.mul(unique, factor - 1, out=factors).add_(1))
    return base.add_(mean_of_changes(deltas, count))


@dataclass(frozen=True)
class _CountingChanges(StoredGather):
    """Counts for each model the changed elements that it shares with others, and those that it has alone."""

    whole = True  # they are few numbers

    epsilon: float

    def __call__(self, deltas: Sequence[Tensor], place: Place) -> tuple[Counts, ...]:
        count = drop_unchanged(deltas, self.epsilon)
        unique = torch.eq(count, 1, out=count)
        return tuple(_count(delta.ne_(0), unique) for delta in deltas)

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        return add_partials(total, slab.count_changes(self.epsilon))


def _count(changed: Tensor, unique: Tensor) -> Counts:
    whole = int(torch.count_nonzero(changed))
    alone = int(torch.count_nonzero(changed.mul_(unique)))
    return whole - alone, alone
