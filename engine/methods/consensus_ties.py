"""Consensus TIES: TIES without what serves fewer than `k` models.

Source: Wang et al., "Localizing task information for improved model merging and compression" (TALL-masks),
arXiv:2405.07813, section 4 (masks and consensus).

For: as consensus_ta, where signs disagree as well.

Evidence: CLIP ViTs and T5 (the source); none known for LLMs.
"""

from collections.abc import Sequence
from typing import Annotated

from mergemill.engine.methods.consensus import add_agreed, fuse_agreed
from mergemill.engine.methods.contract import Density, PerModel, Within, merge_method
from mergemill.engine.methods.task_vectors import add_agreeing_deltas, fuse_agreeing
from mergemill.engine.methods.trim import (
    TRIM_BYTES,
    TRIM_ROUNDS,
    Trim,
    apply_trims,
    keeps_of,
    rank_largest,
    trim_to_largest,
)
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


def _fuse(
    statistics: Sequence[Trim],
    weight: Sequence[float],
    lambda_mask: Sequence[float],
    k: int,
    normalize: bool,
    lambda_: float,
) -> Fusion:
    merged = fuse_agreeing(weight, keeps_of(statistics), lambda_=1.0, normalize=normalize)
    return fuse_agreed(merged, lambda_mask=lambda_mask, k=k, lambda_=lambda_)


@merge_method(
    reads="rank",
    base="required",
    statistics=trim_to_largest,
    rounds=TRIM_ROUNDS,
    extra_slabs=6,
    extra_slabs_each=1,
    extra_bytes=TRIM_BYTES,
    fused=_fuse,
    at_once=rank_largest,
)
def consensus_ties(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Sequence[Trim],
    place: Place,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = (1.0,),
    lambda_mask: PerModel[float] = (0.4,),
    k: Annotated[int, Within(0)] = 2,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Return the base plus ``lambda · M``, M the TIES merge of the deltas, where at least `k` models agree.

    A model agrees where ``|D| >= lambda_mask · |M - D|`` for its delta D, untrimmed. Shapes: all ``[n]``.
    """
    trimmed = [delta.clone() for delta in deltas]
    apply_trims(trimmed, statistics, place)
    merged = add_agreeing_deltas(torch.zeros_like(base), trimmed, weight, lambda_=1.0, normalize=normalize)
    return add_agreed(base, merged, deltas, lambda_mask=lambda_mask, k=k, lambda_=lambda_)
