"""PCB: let models compete for each element, by how large it is in a model and how the others agree with it.

Source: Du et al., "Parameter competition balancing for model merging", arXiv:2410.02396, section 3. The paper flattens
the model; here every tensor is balanced by itself.

For: a few fine-tunes of unlike tasks that compete for the same weights.

Evidence: T5, ViTs and LLMs of 7B (the source).
"""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.methods.contract import Density, merge_method
from mergemill.engine.tensors.cut import Cut
from mergemill.engine.tensors.device import divide_
from mergemill.engine.tensors.elementary import exp_, tanh_
from mergemill.engine.tensors.exact import Extremes, find_extremes
from mergemill.engine.tensors.fusion import Fusion, Join, Keep, Scores
from mergemill.engine.tensors.histograms import StoredDerive
from mergemill.engine.tensors.kernels import Gather, Partial, StoredGather, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.select import RANK_BYTES, SELECT_ROUNDS, mark_largest, one_more, select_largest
from mergemill.engine.tensors.stored import StoredSlab

_NO_WEIGHT = 1e-12


@dataclass(frozen=True, slots=True)
class Balance:
    """What must be known of all task vectors before an element is weighed."""

    sizes: tuple[Extremes, ...]  # of the magnitudes of each
    kept: tuple[Cut, ...]  # the largest scores of each
    highest: tuple[float, ...]  # score of each


def balance(place: Place, dtype: str, ratio: float) -> Generator[Gather, Any, Balance]:
    """Find for each task vector its ``max(1, floor(ratio · n))`` largest scores, and their range."""
    sizes = yield _Sizes()
    count = max(1, math.floor(ratio * place.size))
    scores = _Scoring(sizes)
    cuts = yield from select_largest(place, [(count, 1)] * len(sizes), dtype, scores, signed=True)
    return Balance(sizes, tuple(kept for kept, _ in cuts), tuple(first.threshold for _, first in cuts))


def _fuse(statistics: Balance, lambda_: float) -> Fusion:
    pairs = zip(statistics.kept, statistics.highest, strict=True)
    spans = tuple(0.0 if highest == kept.threshold else highest - kept.threshold for kept, highest in pairs)
    keeps = tuple(Keep(cut=cut) for cut in statistics.kept)
    return Fusion(Join("balance", spans, lambda_=lambda_), keeps, derived=_lower_sizes(statistics.sizes))


@merge_method(
    reads="rank",
    base="required",
    statistics=balance,
    rounds=one_more(SELECT_ROUNDS),
    extra_slabs=8,
    extra_bytes=2 * RANK_BYTES,
    fused=_fuse,
)
def pcb(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Balance,
    place: Place,
    *,
    ratio: Density = 0.1,
    lambda_: float = 1.2,
) -> Tensor:
    """Return ``base + lambda · sum(β[i] · deltas[i]) / sum(β[i])``, and the base where no β is above 0.

    An element's score in a model is ``exp(K · minmax(|D_i|)²) · tanh(D_i · sum(D_j))`` for K models, with the minimum
    and maximum of |D_i| over the tensor. Each model keeps its largest scores, the share `ratio` of all; these, mapped
    linearly to [0, 1], are its β; all 1 where they are equal. Shapes: all ``[n]``.
    """
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    scores = _iterate_scores(statistics.sizes, deltas)
    for delta, score, kept, highest in zip(deltas, scores, statistics.kept, statistics.highest, strict=True):
        share = _make_share(score, kept, highest, place)
        divisor.add_(share)
        total.add_(delta.mul_(share))
    return base.add_(total.div_(divisor.clamp_(min=_NO_WEIGHT)).mul_(lambda_))


def _make_share(score: Tensor, kept: Cut, highest: float, place: Place) -> Tensor:
    marks = mark_largest(score, kept, place, torch.empty_like(score))
    if highest == kept.threshold:
        return marks
    return divide_(score.sub_(kept.threshold), highest - kept.threshold).clamp_(0.0, 1.0).mul_(marks)


class _Sizes(StoredGather):
    """Gathers the least and the largest magnitude of each task vector."""

    whole = True  # they are few numbers

    def __call__(self, deltas: Sequence[Tensor], place: Place) -> tuple[Extremes, ...]:
        return tuple(find_extremes(delta.abs_()) for delta in deltas)

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        return add_partials(total, slab.find_extremes())


@dataclass(frozen=True, slots=True)
class _Scoring(StoredDerive):
    """Derives the scores."""

    signed = True
    sizes: Sequence[Extremes]

    def __call__(self, deltas: Sequence[Tensor], place: Place) -> Sequence[Tensor]:
        return [delta.copy_(score) for delta, score in zip(deltas, _iterate_scores(self.sizes, deltas), strict=True)]

    def in_stored(self, slab: StoredSlab) -> Sequence[int]:
        """Those of the tensors, in their order."""
        return range(slab.count, 2 * slab.count)

    @property
    def derived(self) -> Scores:
        """The magnitudes' range."""
        return _lower_sizes(self.sizes)


def _lower_sizes(sizes: Sequence[Extremes]) -> Scores:
    return Scores(tuple(size.least for size in sizes), tuple(size.most - size.least for size in sizes))


def _iterate_scores(sizes: Sequence[Extremes], deltas: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the scores of each task vector, in its dtype; it may be overwritten once they are there.

    They are divided by ``exp(K)``, which cancels in the shares and keeps any number of models finite.
    """
    total = deltas[0].new_zeros(deltas[0].shape, dtype=torch.float64)
    for delta in deltas:
        total.add_(delta)
    for size, delta in zip(sizes, deltas, strict=True):
        wide = delta.to(torch.float64, copy=True)
        agreement = tanh_(wide * total)
        # A span that is nothing, or beyond float64, leaves nothing to compare by.
        span = size.most - size.least
        relative = divide_(wide.abs_().sub_(size.least), span) if 0 < span < math.inf else wide.zero_()
        within = exp_(relative.mul_(relative).sub_(1.0).mul_(len(deltas)))
        yield within.mul_(agreement).to(delta.dtype)
