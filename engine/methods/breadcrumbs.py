"""Model Breadcrumbs: task vectors without their smallest and their largest elements, summed.

Source: Davari and Belilovsky, "Model Breadcrumbs: scaling multi-task model merging with sparse masks",
arXiv:2312.06795, section 3.

For: many task vectors, each with a few outliers.

Evidence: CLIP ViTs and T5 (the source); none known for LLMs.
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import Density, PerModel, merge_method
from mergemill.engine.methods.task_vectors import add_deltas, fuse_sum
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
    return fuse_sum(weight, keeps_of(statistics), lambda_=lambda_, normalize=normalize)


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
def breadcrumbs(
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
    """Return the base plus the weighted sum of the trimmed task vectors.

    Of n elements the ``floor(gamma · n)`` largest are dropped, and the ``floor(density · n)`` that follow are kept.
    Shapes: all ``[n]``.
    """
    apply_trims(deltas, statistics, place)
    return add_deltas(base, deltas, weight, lambda_=lambda_, normalize=normalize)
