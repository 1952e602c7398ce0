"""Breadcrumbs-TIES: task vectors without their smallest and largest elements; elect a sign, merge what agrees.

Source: Davari and Belilovsky, "Model Breadcrumbs", arXiv:2312.06795, section 3; the signs as in Yadav et al.,
arXiv:2306.01708, algorithm 1.

For: as breadcrumbs, where signs disagree as well.

Evidence: none known for LLMs; the pair is mergekit's.
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import Density, PerModel, merge_method
from mergemill.engine.methods.task_vectors import add_agreeing_deltas, fuse_agreeing
from mergemill.engine.methods.trim import (
    OUTLIER_BYTES,
    TRIM_ROUNDS,
    Trim,
    apply_trims,
    keeps_of,
    rank_under_outliers,
    trim_outliers,
)
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place


def _fuse(statistics: Sequence[Trim], weight: Sequence[float], normalize: bool, lambda_: float) -> Fusion:
    return fuse_agreeing(weight, keeps_of(statistics), lambda_=lambda_, normalize=normalize)


@merge_method(
    reads="rank",
    base="required",
    statistics=trim_outliers,
    rounds=TRIM_ROUNDS,
    extra_bytes=OUTLIER_BYTES,
    fused=_fuse,
    at_once=rank_under_outliers,
    unread_at_zero="weight",
)
def breadcrumbs_ties(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Sequence[Trim],
    place: Place,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = (1.0,),
    gamma: PerModel[Density] = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Return the base plus the trimmed task vectors where their sign is the elected one.

    Of n elements the ``floor(gamma · n)`` largest are dropped, and the ``floor(density · n)`` that follow are kept.
    Shapes: all ``[n]``.
    """
    apply_trims(deltas, statistics, place)
    return add_agreeing_deltas(base, deltas, weight, lambda_=lambda_, normalize=normalize)
