"""NuSLERP: SLERP by weights, of two models or of their task vectors, over whole tensors, rows or columns.

Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; weights and rows as mergekit's `nuslerp`.

For: two models or their task vectors, by weights.

Evidence: none known.
"""

import itertools
import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from mergemill.engine.methods.contract import Grain, PerModel, merge_method
from mergemill.engine.methods.gram import Coefficients, combine_linearly, fuse_linearly, gram_matrix
from mergemill.engine.methods.rows import multiply_rows, view_rows
from mergemill.engine.tensors.device import put_beside, to_host
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Gather
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place

_NO_WEIGHT, _NO_NORM = 1e-6, 1e-7
# Of 1 - cos². Not 1e-16, which float64 cannot tell from 0: of opposite inputs, noise would be what is left.
_COLINEAR = 1e-14


def _grain(nuslerp_flatten: bool, nuslerp_row_wise: bool) -> Grain:
    if nuslerp_flatten:
        return "block"
    return "tensor" if nuslerp_row_wise else "row"


def _find_coefficients(weight: Sequence[float], nuslerp_flatten: bool) -> Generator[Gather, Any, Coefficients | None]:
    """Find the two coefficients of flattened tensors; rows find theirs in the slab."""
    if not nuslerp_flatten:
        return None
    gram = yield from gram_matrix()
    norms = [max(math.sqrt(gram[i][i]), _NO_NORM) for i in range(2)]
    return _find_arc(gram[0][1] / (norms[0] * norms[1]), _share_of_second(weight))


def _fuse(statistics: Coefficients | None) -> Fusion | None:
    return None if statistics is None else fuse_linearly(statistics)


@merge_method(
    reads="gram",
    base="optional",
    inputs=(2, 2),
    statistics=_find_coefficients,
    rounds=1,
    grain=_grain,
    extra_slabs=10,
    fused=_fuse,
)
def nuslerp(
    deltas: list[Tensor],
    base: Tensor | None,
    statistics: Coefficients | None,
    place: Place,
    *,
    weight: PerModel[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Return the point at ``t = w₂/(w₁+w₂)`` of the arc between two inputs, the base added where there is one.

    ``sin((1-t)θ)/sin θ · a + sin(tθ)/sin θ · b``, straight where θ or its supplement is under 1e-7. θ is the angle of
    the flattened tensors or, without `nuslerp_flatten`, of each row (last axis); with `nuslerp_row_wise` then that of
    each column (first axis). A vector is one row and one column. Shapes: all ``[n]``.
    """
    if statistics is not None:
        arc = combine_linearly(deltas, statistics)
    else:
        _turn_rows([_view(delta, place, nuslerp_row_wise) for delta in deltas], _share_of_second(weight))
        arc = deltas[0]
    return arc if base is None else base.add_(arc)


def _share_of_second(weight: Sequence[float]) -> float:
    total = math.fsum(weight)
    return 0.5 if abs(total) < _NO_WEIGHT else weight[1] / total


def _find_arc(cosine: float, t: float) -> tuple[float, float]:
    """Return the coefficients of the two ends at `t` of an arc."""
    if not 1 - cosine * cosine > _COLINEAR:  # also where it is not a number
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _view(tensor: Tensor, place: Place, columns: bool) -> Tensor:
    return tensor.view(place.shape[0] if place.shape else 1, -1).T if columns else view_rows(tensor, place)


def _turn_rows(rows: Sequence[Tensor], t: float) -> None:
    """Write, row by row, the point at `t` of the arc into the first of two inputs ``[r, c]``."""
    a, b = (row.to(torch.float64) for row in rows)
    scratch = torch.empty_like(a)
    left, right = (multiply_rows(x, x, scratch).sqrt_().clamp_(min=_NO_NORM) for x in (a, b))
    cosines = multiply_rows(a, b, scratch).div_(left.mul_(right))
    # One angle a row: math's functions, unlike those of arrays, do not follow the machine's vector registers.
    arcs = itertools.chain.from_iterable(_find_arc(cosine, t) for cosine in to_host(cosines).tolist())
    ends = put_beside(np.fromiter(arcs, np.float64, 2 * len(cosines)), a).view(-1, 2).to(rows[0].dtype)
    rows[0].mul_(ends[:, :1]).add_(rows[1].mul_(ends[:, 1:]))
