"""Consensus merging: of a merged task vector, only what is selective for enough of the models stays.

Source: Wang et al., "Localizing task information for improved model merging and compression" (TALL-masks),
arXiv:2405.07813, section 4 (masks and consensus).
"""

from collections.abc import Sequence
from dataclasses import replace

from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor, torch


def add_agreed(
    base: Tensor, merged: Tensor, deltas: Sequence[Tensor], *, lambda_mask: Sequence[float], k: int, lambda_: float
) -> Tensor:
    """Return ``base + lambda · merged`` where at least `k` models' masks agree, else the base.

    Model i's mask is ``|deltas[i]| >= lambda_mask[i] · |merged - deltas[i]|``. Shapes: all ``[n]``; `base`, `merged`
    and `deltas` are overwritten.
    """
    votes, mask = torch.zeros_like(base), torch.empty_like(base)
    for delta, factor in zip(deltas, lambda_mask, strict=True):
        torch.sub(merged, delta, out=mask).abs_().mul_(factor)
        votes.add_(torch.ge(delta.abs_(), mask, out=mask))
    return base.add_(merged.mul_(torch.ge(votes, k, out=votes)).mul_(lambda_))


def fuse_agreed(fusion: Fusion, *, lambda_mask: Sequence[float], k: int, lambda_: float) -> Fusion:
    """Return `add_agreed` as native loops do it, of a fusion that makes `merged` and adds it to the base."""
    return replace(fusion, join=replace(fusion.join, masks=tuple(lambda_mask), votes=k, lambda_=lambda_))
