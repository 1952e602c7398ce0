"""Model Stock: from the base towards the models' mean, by as much as the models agree.

Source: Jang et al., "Model Stock: all we need is just a few fine-tuned models", arXiv:2403.19522, section 4.

For: two or more fine-tunes of one task, with their base.

Evidence: none beyond vision models (the source: CLIP ViTs).
"""

import math
from collections.abc import Generator, Sequence
from typing import Any

from mergemill.engine.methods.contract import Grain, merge_method
from mergemill.engine.methods.gram import gram_matrix
from mergemill.engine.methods.rows import multiply_rows, view_rows
from mergemill.engine.tensors.device import divide_
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.kernels import Gather
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place

_LEAST_PRODUCT = 1e-6  # of two norms
_SINGULAR = 1e-6


def _grain(filter_wise: bool) -> Grain:
    return "row" if filter_wise else "block"


def _find_share(filter_wise: bool) -> Generator[Gather, Any, float | None]:
    """Find how far towards the mean to go; rows find theirs in the slab."""
    if filter_wise:
        return None
    gram = yield from gram_matrix()
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    cosines = [_cosine(gram[i][j], norms[i] * norms[j]) for i in range(len(gram)) for j in range(i)]
    mean = math.fsum(cosines) / len(cosines)
    divisor = 1 + (len(gram) - 1) * mean
    return 0.0 if abs(divisor) < _SINGULAR else len(gram) * mean / divisor


def _fuse(statistics: float | None, place: Place) -> Fusion | None:
    if statistics is None:
        return None
    count = len(place.models)
    return Fusion(Join("add", (1.0,) * count, divisor=count, lambda_=statistics))


@merge_method(
    reads="gram",
    base="required",
    inputs=(2, None),
    statistics=_find_share,
    rounds=1,
    grain=_grain,
    extra_slabs=8,
    extra_slabs_each=2,
    fused=_fuse,
)
def model_stock(
    base: Tensor, deltas: list[Tensor], statistics: float | None, place: Place, *, filter_wise: bool = False
) -> Tensor:
    """Return ``base + t · mean(deltas)`` with ``t = N·c / (1 + (N-1)·c)`` for N models.

    c is the mean cosine between two deltas, of whole tensors or, with `filter_wise`, of each row (a vector is one
    row); t is 0 where the divisor is under 1e-6. Shapes: all ``[n]``.
    """
    share = _find_shares([view_rows(delta, place) for delta in deltas]) if statistics is None else statistics
    mean = deltas[0]
    for delta in deltas[1:]:
        mean.add_(delta)
    divide_(mean, len(deltas))
    view_rows(mean, place).mul_(share) if isinstance(share, torch.Tensor) else mean.mul_(share)
    return base.add_(mean)


def _cosine(product: float, norms: float) -> float:
    cosine = product / max(norms, _LEAST_PRODUCT)
    return 0.0 if math.isnan(cosine) else min(max(cosine, -1.0), 1.0)  # not a number: beyond float64


def _find_shares(rows: Sequence[Tensor]) -> Tensor:
    """Return how far towards the mean each row goes: ``[r, 1]``, of inputs ``[r, c]``."""
    count, wide = len(rows), [row.to(torch.float64) for row in rows]
    scratch = torch.empty_like(wide[0])
    norms = [multiply_rows(x, x, scratch).sqrt_() for x in wide]
    mean = torch.zeros_like(norms[0])
    for i in range(count):
        for j in range(i):
            least = torch.mul(norms[i], norms[j]).clamp_(min=_LEAST_PRODUCT)
            cosine = multiply_rows(wide[i], wide[j], scratch).div_(least)
            mean.add_(cosine.nan_to_num_(0.0).clamp_(-1, 1))
    divide_(mean, count * (count - 1) // 2)
    divisor = mean.mul(count - 1).add_(1)
    singular = divisor.abs().lt_(_SINGULAR)
    share = mean.mul_(count).div_(divisor.add_(singular)).mul_(1 - singular)
    return share[:, None].to(rows[0].dtype)
