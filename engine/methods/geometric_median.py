"""Geometric median: the point whose summed distance to all task vectors is least; one outlier cannot drag it away.

Source: Weiszfeld, "Sur le point pour lequel la somme des distances de n points donnés est minimum", Tohoku Math. J. 43,
1937; the step at an input by Vardi & Zhang, "The multivariate L1-median and associated data depth", PNAS 97, 2000.

For: several fine-tunes of which one may be far off.

Evidence: none known.
"""

import math
from collections.abc import Generator, Sequence
from typing import Annotated, Any

from mergemill.engine.methods.contract import PerModel, Within, merge_method
from mergemill.engine.methods.gram import (
    GRAM_BYTES,
    Coefficients,
    Gram,
    combine_linearly,
    dot,
    fuse_added,
    gram_matrix,
    is_finite,
    norm,
    times,
)
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Gather
from mergemill.engine.tensors.lazy import Tensor

_AT_ONE = 1e-7  # of the longest task vector: nearer than that, the median is at an input


def _no_weight(*, weight: Sequence[float]) -> str | None:
    return None if math.fsum(weight) > 0 else "the weights are all zero; at least one must not be"


def _find_coefficients(weight: Sequence[float], max_iter: int, tol: float) -> Generator[Gather, Any, Coefficients]:
    """Find the coefficients of the task vectors, which sum to 1."""
    gram = yield from gram_matrix()
    largest = max(gram[i][i] for i in range(len(gram)))
    start = [w / math.fsum(weight) for w in weight]
    if not largest or not is_finite(gram):
        return tuple(start)
    return _find_median(tuple(tuple(g / largest for g in row) for row in gram), start, weight, max_iter, tol)


def _fuse(statistics: Coefficients, lambda_: float) -> Fusion | None:
    return fuse_added(statistics, lambda_)


@merge_method(
    reads="gram",
    base="required",
    statistics=_find_coefficients,
    rounds=1,
    extra_bytes=GRAM_BYTES,
    check=_no_weight,
    fused=_fuse,
)
def geometric_median(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Coefficients,
    *,
    weight: PerModel[Annotated[float, Within(0)]] = (1.0,),
    max_iter: Annotated[int, Within(0)] = 100,
    tol: Annotated[float, Within(0)] = 1e-6,
    lambda_: float = 1.0,
) -> Tensor:
    """Return ``base + lambda · y`` with the y that makes ``Σ weight[i] · ‖y - deltas[i]‖`` least.

    From the weighted mean, steps ``y ← Σ (wᵢ/dᵢ) Dᵢ / Σ (wᵢ/dᵢ)``, dᵢ the distance of y to Dᵢ, until a step is at most
    `tol` of the mean distance or `max_iter` are done. At an input, y stays where the pull of the others is no more
    than the input's own weight, else it leaves by the share that exceeds it. Shapes: all ``[n]``.
    """
    return base.add_(combine_linearly(deltas, statistics).mul_(lambda_))


def _find_median(gram: Gram, start: list[float], weight: Sequence[float], max_iter: int, tol: float) -> Coefficients:
    """Return the median's coefficients; the longest input of `gram` has length 1."""
    median = start
    for _ in range(max_iter):
        distances = _distances(gram, median)
        near = [d <= _AT_ONE for d in distances]
        pulls = [0.0 if at else w / d for w, d, at in zip(weight, distances, near, strict=True)]
        pull = math.fsum(pulls)
        if not pull:
            break
        step = [p / pull - m for p, m in zip(pulls, median, strict=True)]
        length = norm(gram, step)
        holding = math.fsum(w for w, at in zip(weight, near, strict=True) if at)
        share = max(0.0, 1 - holding / (pull * length)) if pull * length > 0 else 0.0
        median = [m + share * s for m, s in zip(median, step, strict=True)]
        if share * length <= tol * dot(weight, distances) / math.fsum(weight):
            break
    return tuple(median)


def _distances(gram: Gram, point: Sequence[float]) -> list[float]:
    """Return the distance of a combination to each input."""
    products = times(gram, point)
    return [
        math.sqrt(max(0.0, math.fsum((c - (i == j)) * (products[j] - gram[i][j]) for j, c in enumerate(point))))
        for i in range(len(gram))
    ]
