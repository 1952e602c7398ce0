"""DELLA, linear: drop elements of the task vectors at random, small ones rather, rescale, sum.

Source: Deep et al., "DELLA-Merging: reducing interference in model merging through magnitude-based sampling",
arXiv:2406.11617, section 3.

For: as dare_linear, with the larger changes more likely to stay.

Evidence: LLMs of 13B (the source), where signs are elected.
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import Density, PerModel, merge_method
from mergemill.engine.methods.drop import MAGPRUNE_SLABS, keeps_of_magprune, magprune, magpruned_norms, refuse_epsilon
from mergemill.engine.methods.task_vectors import add_deltas, fuse_sum
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place


def _fuse(
    statistics: Sequence[float],
    place: Place,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    lambda_: float,
) -> Fusion:
    keeps = keeps_of_magprune(density, epsilon, statistics, place)
    return fuse_sum(weight, keeps, lambda_=lambda_, normalize=normalize)


@merge_method(
    reads="row",
    base="required",
    statistics=magpruned_norms,
    rounds=1,
    grain="row",
    extra_slabs=MAGPRUNE_SLABS,
    check=refuse_epsilon,
    fused=_fuse,
    unread_at_zero="weight",
)
def della_linear(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Sequence[float],
    place: Place,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = (1.0,),
    epsilon: PerModel[float] = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Return the base plus the weighted sum of the thinned task vectors.

    The element of rank r (ascending, 1…c) in its row stays with the probability
    ``density - epsilon + 2·epsilon·(r - 1)/(c - 1)``. Shapes: all ``[n]``, whole rows.
    """
    magprune(deltas, density, epsilon, statistics, place)
    return add_deltas(base, deltas, weight, lambda_=lambda_, normalize=normalize)
