"""Karcher mean: the centre of the models' directions on the sphere, as long as they are on average.

Source: Wang et al., "Functionality-oriented LLM merging on the Fisher-Rao manifold", arXiv:2603.04972.

For: several models that lie far apart, without a base.

Evidence: LLMs (the source).
"""

import math
from collections.abc import Generator
from typing import Annotated, Any

from mergemill.engine.methods.contract import Within, merge_method
from mergemill.engine.methods.gram import (
    GRAM_BYTES,
    Coefficients,
    Gram,
    combine_linearly,
    fuse_linearly,
    gram_matrix,
    is_finite,
    norm,
    split_gram,
    times,
)
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Gather
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place

_NO_ANGLE = 1e-7  # float64's cosine tells no smaller one


def _find_coefficients(place: Place, max_iter: int, tol: float) -> Generator[Gather, Any, Coefficients]:
    """Find the coefficients of the inputs: those of the mean direction on the units, times mean length over length."""
    count = len(place.models)
    if count == 1:
        return (1.0,)
    gram = yield from gram_matrix()
    if not is_finite(gram):
        return (1 / count,) * count
    norms, units = split_gram(gram)
    taking_part = [i for i in range(count) if norms[i] > tol]
    inner = tuple(tuple(units[i][j] for j in taking_part) for i in taking_part)
    length = math.fsum(norms) / count
    coefficients = [0.0] * count
    for i, share in zip(taking_part, _find_mean(inner, max_iter, tol), strict=True):
        coefficients[i] = share * length / norms[i]
    return tuple(coefficients)


def _fuse(statistics: Coefficients) -> Fusion | None:
    return fuse_linearly(statistics)


@merge_method(reads="gram", statistics=_find_coefficients, rounds=1, extra_bytes=GRAM_BYTES, fused=_fuse)
def karcher(
    models: list[Tensor],
    statistics: Coefficients,
    *,
    max_iter: Annotated[int, Within(0)] = 10,
    tol: Annotated[float, Within(0)] = 1e-5,
) -> Tensor:
    """Return the mean of the models' directions on the sphere times the mean of their norms; one model as it is.

    From the normalised mean of the unit vectors u, steps ``μ ← exp_μ(mean of log_μ(u))`` until a step is under `tol`
    or `max_iter` are done, with ``log_μ(u) = θ/sin θ · (u - cos θ · μ)``. Models whose norm is at most `tol` have no
    direction. Shapes: all ``[n]``.
    """
    return combine_linearly(models, statistics)


def _find_mean(units: Gram, max_iter: int, tol: float) -> list[float]:
    """Return the Karcher mean of unit vectors as coefficients on them."""
    if not units:
        return []
    mean = [1 / len(units)] * len(units)
    length = norm(units, mean)
    # Directions that cancel have no mean to begin with; the first will do.
    mean = [m / length for m in mean] if length > tol else [1.0] + [0.0] * (len(units) - 1)
    for _ in range(max_iter):
        tangent = _mean_tangent(units, mean, tol)
        step = norm(units, tangent)
        if step < tol or not step:
            break
        mean = [math.cos(step) * m + math.sin(step) / step * t for m, t in zip(mean, tangent, strict=True)]
        length = norm(units, mean)
        mean = [m / length for m in mean] if length > tol else mean
    return mean


def _mean_tangent(units: Gram, mean: list[float], tol: float) -> list[float]:
    """Return the mean of ``log_mean(u)`` over the units, as coefficients on them."""
    tangent = [0.0] * len(units)
    along = []
    for i, product in enumerate(times(units, mean)):
        cosine = min(max(product, -1.0), 1.0)
        angle = math.acos(cosine)
        # A unit at the mean adds nothing, one opposite to it points nowhere.
        if tol <= angle <= math.pi - max(tol, _NO_ANGLE):
            tangent[i] = (angle / math.sin(angle) if angle > _NO_ANGLE else 1.0) / len(units)
            along.append(tangent[i] * cosine)
    back = math.fsum(along)
    return [t - back * m for t, m in zip(tangent, mean, strict=True)]
