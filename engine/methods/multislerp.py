"""MultiSLERP: a weighted mean of directions, as long as the weighted mean of lengths.

Source: Goddard, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea.

For: several models as directions of equal rank.

Evidence: none known.
"""

import math
from collections.abc import Generator, Sequence
from typing import Any

from mergemill.engine.errors import MergeError
from mergemill.engine.methods.contract import PerModel, merge_method, say_number
from mergemill.engine.methods.gram import (
    GRAM_BYTES,
    Coefficients,
    combine_linearly,
    dot,
    fuse_linearly,
    gram_matrix,
    is_finite,
    norm,
    split_gram,
)
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Gather
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place


def _weights_cancel(*, weight: Sequence[float], normalize_weights: bool) -> str | None:
    if normalize_weights and len(weight) > 1 and abs(sum(weight)) < 1e-8:
        return f"the weights {', '.join(map(say_number, weight))} sum to zero; with normalize_weights they must not"
    return None


def _find_coefficients(
    place: Place, weight: Sequence[float], normalize_weights: bool, eps: float
) -> Generator[Gather, Any, Coefficients]:
    """Find the coefficients of the inputs: ``wᵢ/(‖Wᵢ‖+eps) · Σwⱼ‖Wⱼ‖ / ‖Σwⱼuⱼ‖ · cos(eps)``.

    The tangents ``uᵢ - (uᵢ·μ)μ`` at ``μ = Σwᵢuᵢ/‖Σwᵢuᵢ‖``, summed with the same weights, are ``Σwᵢuᵢ - ‖Σwᵢuᵢ‖μ``,
    which is zero: the step along them leads nowhere, and of the point that it leads to only ``cos(0 + eps)·μ`` is left.
    """
    if len(weight) == 1:
        return (1.0,)
    gram = yield from gram_matrix()
    weights = tuple(w / math.fsum(weight) for w in weight) if normalize_weights else tuple(weight)
    if not is_finite(gram):
        return weights
    norms, units = split_gram(gram)
    length = norm(units, [w * n / (n + eps) for w, n in zip(weights, norms, strict=True)])
    if length >= eps:
        scale = dot(weights, norms) / length * math.cos(eps)
        return tuple(scale * w / (n + eps) for w, n in zip(weights, norms, strict=True))
    if len(weights) > 2 and max(norms) > eps:
        raise MergeError(
            f"{place.tensor}: the weighted directions of its {len(weights)} inputs cancel, so that they have no mean; "
            f"other weights would do"
        )
    return weights


def _fuse(statistics: Coefficients) -> Fusion | None:
    return fuse_linearly(statistics)


@merge_method(
    reads="gram",
    base="optional",
    statistics=_find_coefficients,
    rounds=1,
    extra_bytes=GRAM_BYTES,
    check=_weights_cancel,
    fused=_fuse,
)
def multislerp(
    deltas: list[Tensor],
    base: Tensor | None,
    statistics: Coefficients,
    *,
    weight: PerModel[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Return the weighted mean of the inputs on the sphere, the base added where there is one; one input as it is.

    The direction is that of ``Σ wᵢ Wᵢ/(‖Wᵢ‖+eps)``, the length ``Σ wᵢ‖Wᵢ‖``. Where the directions cancel: a straight
    mean of two inputs, an error of more. Shapes: all ``[n]``.
    """
    mean = combine_linearly(deltas, statistics)
    return mean if base is None else base.add_(mean)
