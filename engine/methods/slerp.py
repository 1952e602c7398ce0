"""SLERP: spherical interpolation between two models.

Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, on the flattened tensor.

For: two models, also without a common base.

Evidence: none in the source, which is of computer graphics.
"""

import math

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.gram import GRAM_BYTES, Gram, combine_linearly, fuse_linearly, gram_matrix
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor

_PARALLEL = 0.9995  # beyond this |cos| the two are taken as parallel
_NO_NORM = 1e-8


def _fuse(statistics: Gram, t: float) -> Fusion | None:
    return fuse_linearly(_coefficients(statistics, t))


@merge_method(
    reads="gram",
    base="first of two",
    inputs=(2, 2),
    statistics=gram_matrix,
    rounds=1,
    extra_bytes=GRAM_BYTES,
    fused=_fuse,
)
def slerp(models: list[Tensor], statistics: Gram, *, t: float) -> Tensor:
    """Return the point at `t` of the great arc from the base (``models[0]``) to the other model.

    ``sin((1-t)θ)/sin θ · a + sin(tθ)/sin θ · b`` with θ the angle between the whole tensors; a straight line where
    they are almost parallel. Shapes: both ``[n]``; the result ``[n]``.
    """
    return combine_linearly(models, _coefficients(statistics, t))


def _coefficients(gram: Gram, t: float) -> tuple[float, float]:
    cosine = gram[0][1] / (_norm(gram[0][0]) * _norm(gram[1][1]))
    if not abs(cosine) <= _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _norm(square: float) -> float:
    norm = math.sqrt(square)
    return norm if norm > _NO_NORM else 1.0
