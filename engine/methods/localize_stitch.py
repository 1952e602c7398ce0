"""Localize-and-Stitch without data: each task vector's largest elements, averaged where several keep the same one.

Source: He et al., "Localize-and-stitch: efficient model merging via sparse task arithmetic", arXiv:2408.13656, section
4.3 (dataless localization) and 3.2 (stitching); the share of the authors' code. The largest are found in each tensor,
where that code flattens the model; a whole model's ranks would need passes over all weights before the first tensor.

For: many tasks, each of which lives in few weights.

Evidence: RoBERTa and ViTs (the source); LLMs of 2 to 9B in MergeBench, arXiv:2505.10833.
"""

from collections.abc import Sequence

from mergemill.engine.methods.changes import drop_unchanged, mean_of_changes
from mergemill.engine.methods.contract import Density, PerModel, merge_method
from mergemill.engine.methods.trim import TRIM_BYTES, Trim, apply_trims, keeps_of, rank_largest, trim_to_largest
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.kernels import Rounds
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.select import SELECT_ROUNDS, USUAL_ROUNDS


def _localize(place: Place, dtype: str, density: Sequence[float]) -> Rounds:
    """Find for each task vector its ``max(1, floor(density · n))`` largest elements."""
    return trim_to_largest(place, dtype, density, rescale=False)


def _localize_whole(size: int, density: Sequence[float]) -> Sequence[Trim] | None:
    return rank_largest(size, density, rescale=False)


def _fuse(statistics: Sequence[Trim], lambda_: float) -> Fusion:
    return Fusion(Join("changed", (0.0,) * len(statistics), lambda_=lambda_), keeps_of(statistics))


@merge_method(
    reads="rank",
    base="required",
    statistics=_localize,
    rounds=(USUAL_ROUNDS, max(SELECT_ROUNDS.values())),
    extra_bytes=TRIM_BYTES,
    fused=_fuse,
    at_once=_localize_whole,
)
def localize_stitch(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Sequence[Trim],
    place: Place,
    *,
    density: PerModel[Density] = (0.05,),
    lambda_: float = 1.0,
) -> Tensor:
    """Return the base plus `lambda` times the mean, element by element, of the kept deltas that are not 0.

    Each task vector keeps its ``max(1, floor(density · n))`` largest elements. Shapes: all ``[n]``.
    """
    apply_trims(deltas, statistics, place)
    count = drop_unchanged(deltas, 0.0)
    return base.add_(mean_of_changes(deltas, count).mul_(lambda_))
