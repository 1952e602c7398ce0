"""CABS: task vectors thinned one after the other to the n largest of every m elements, none of them taken twice.

Source: Yang et al., "CABS: conflict-aware and balanced sparsification for enhancing model merging", arXiv:2503.01874,
section 4; n, m and weights as in the authors' code for 7B models. What is left at a tensor's end keeps its share,
⌊n·r/m⌋ of r elements, where that code drops it, and no 0 is kept, so that it is free for the next model.

For: two or a few fine-tunes that change the same weights; the first listed has the first choice.

Evidence: LLMs of 7B and RoBERTa (the source).
"""

from collections.abc import Sequence
from typing import Annotated

from mergemill.engine.methods.contract import PerModel, Within, merge_method
from mergemill.engine.tensors.fusion import FUSED_ELEMENTS, Fusion, Join
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.slabs import BLOCK


def _no_more_than_all(*, n: int, m: int) -> str | None:
    return f"n is {n}, and m only {m}: no more can be kept than there is" if n > m else None


def _groups(m: int) -> int:
    return m


def _fuse(weight: Sequence[float], n: int, m: int, lambda_: float) -> Fusion | None:
    whole = FUSED_ELEMENTS % m == 0  # else a group is in two of the chunks that native loops take
    return Fusion(Join("turns", tuple(weight), lambda_=lambda_, group=m, kept=n)) if whole else None


@merge_method(reads="element", base="required", grain=_groups, extra_slabs=6, check=_no_more_than_all, fused=_fuse)
def cabs(
    base: Tensor,
    deltas: list[Tensor],
    *,
    weight: PerModel[float] = (1.0,),
    n: Annotated[int, Within(0)] = 64,
    m: Annotated[int, Within(1, BLOCK)] = 256,
    lambda_: float = 1.0,
) -> Tensor:
    """Return ``base + lambda · sum(weight[i] · kept[i])`` in which an element is kept of one model at most.

    In the order of the recipe each task vector keeps the `n` largest of every `m` elements (of the flattened tensor)
    that no model before it has kept, of equal ones the first. Shapes: all ``[n]``.
    """
    free, total = torch.ones_like(base), torch.zeros_like(base)
    for delta, w in zip(deltas, weight, strict=True):
        _keep_largest(delta.mul_(free), n, m)
        free.mul_(torch.eq(delta, 0))
        total.add_(delta.mul_(w))
    return base.add_(total.mul_(lambda_))


def _keep_largest(delta: Tensor, n: int, m: int) -> None:
    """Set to 0 what is not among the `n` largest of its group of `m`."""
    whole = len(delta) // m * m
    for part, kept in ((delta[:whole].view(-1, m), n), (delta[whole:].view(1, -1), n * (len(delta) - whole) // m)):
        if not part.numel() or kept >= part.shape[1]:
            continue
        if not kept:
            part.zero_()
            continue
        sizes = part.abs()
        least = _find_least(sizes, kept)
        keeps = sizes >= least
        if int((keeps.sum(1) != kept).count_nonzero()):  # equal ones at the cut, or what is no number
            larger, equal = sizes > least, sizes == least
            room = kept - larger.sum(1, keepdim=True)
            keeps = larger.logical_or_(equal.logical_and_(equal.cumsum(1) <= room))
        part.mul_(keeps)


def _find_least(sizes: Tensor, kept: int) -> Tensor:
    """Return the least of the `kept` largest of each row ``[r, 1]``; what is no number is larger than all numbers.

    NumPy's partition takes a sixth of the time of torch's kthvalue.
    """
    import numpy as np

    at = sizes.shape[1] - kept
    if sizes.device.type != "cpu":
        return sizes.kthvalue(at + 1, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(sizes.numpy(), at, axis=1)[:, at : at + 1])
