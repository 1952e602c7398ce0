"""TIES: trim each task vector to its largest elements, elect a sign, merge what agrees.

Source: Yadav et al., "TIES-Merging: resolving interference when merging models", arXiv:2306.01708, algorithm 1.

For: task vectors that disagree in signs.

Evidence: T0-3B, T5 and ViTs (the source); LLMs of 2 to 9B in MergeBench, arXiv:2505.10833.
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import Density, PerModel, merge_method
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
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place


def _fuse(statistics: Sequence[Trim], weight: Sequence[float], normalize: bool, lambda_: float) -> Fusion:
    return fuse_agreeing(weight, keeps_of(statistics), lambda_=lambda_, normalize=normalize)


@merge_method(
    reads="rank",
    base="required",
    statistics=trim_to_largest,
    rounds=TRIM_ROUNDS,
    extra_bytes=TRIM_BYTES,
    fused=_fuse,
    at_once=rank_largest,
    unread_at_zero="weight",
)
def ties(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Sequence[Trim],
    place: Place,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = (1.0,),
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = False,
) -> Tensor:
    """Return the base plus the trimmed task vectors where their sign is the elected one. Shapes: all ``[n]``."""
    apply_trims(deltas, statistics, place)
    return add_agreeing_deltas(base, deltas, weight, lambda_=lambda_, normalize=normalize)
