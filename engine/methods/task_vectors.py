"""What the task-vector methods share: rescaling what was kept, electing signs, summing, normalising, adding back.

Source: Ilharco et al., arXiv:2212.04089 (task arithmetic); Yadav et al., arXiv:2306.01708 (sign consensus).
"""

from collections.abc import Sequence

from mergemill.engine.methods.sums import sum_weighted
from mergemill.engine.tensors import exact, native
from mergemill.engine.tensors.device import divide_
from mergemill.engine.tensors.exact import ExactSum
from mergemill.engine.tensors.fusion import Fusion, Join, Keep
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place

_NOTHING = 1e-7  # an L1 norm under this is not rescaled
_NO_WEIGHT = 1e-8


def sum_absolute(delta: Tensor, place: Place) -> ExactSum:
    """Return the L1 norm of a flat slab."""
    return exact.sum_absolute(delta, place.block)


def rescale_factor(whole: float, kept: float) -> float:
    """Return what restores the L1 norm of a task vector of which only a part was kept."""
    return 1.0 if whole < _NOTHING or kept < _NOTHING else whole / kept


def add_deltas(
    base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], *, lambda_: float, normalize: bool
) -> Tensor:
    """Return ``base + lambda · sum(weight[i] · deltas[i])``, the sum divided by ``sum(weight)`` with `normalize`.

    Shapes: all ``[n]``. `base` and `deltas` are overwritten.
    """
    divisor = _find_divisor(weight, normalize=normalize)
    if native.suits(base, *deltas):
        return native.add_deltas(base, deltas, weight, divisor=divisor, lambda_=lambda_)
    total = sum_weighted(deltas, weight)
    if divisor:
        divide_(total, divisor)
    return base.add_(total.mul_(lambda_))


def fuse_sum(weight: Sequence[float], keeps: Sequence[Keep] = (), *, lambda_: float, normalize: bool) -> Fusion:
    """Return `add_deltas` of what is kept as native loops do it."""
    divisor = _find_divisor(weight, normalize=normalize)
    return Fusion(Join("add", tuple(weight), divisor=divisor, lambda_=lambda_), tuple(keeps))


def fuse_agreeing(weight: Sequence[float], keeps: Sequence[Keep], *, lambda_: float, normalize: bool) -> Fusion:
    """Return `add_agreeing_deltas` of what is kept as native loops do it."""
    return Fusion(Join("agree", tuple(weight), lambda_=lambda_, normalize=normalize), tuple(keeps))


def _find_divisor(weight: Sequence[float], *, normalize: bool) -> float:
    return sum(weight) if normalize and abs(sum(weight)) >= _NO_WEIGHT else 0.0


def add_agreeing_deltas(
    base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], *, lambda_: float, normalize: bool
) -> Tensor:
    """Return ``base + lambda · sum(weight[i] · deltas[i])`` over the elements whose sign is the elected one.

    Elected is the sign of the sum of all weighted deltas, 0 counting as plus. With `normalize` each element is
    divided by the sum of the weights that went into it, where that is not nothing. Shapes: all ``[n]``; `base` and
    `deltas` are overwritten.
    """
    if native.suits(base, *deltas):
        return native.add_agreeing(base, deltas, weight, normalize=normalize, lambda_=lambda_)
    for delta, w in zip(deltas, weight, strict=True):
        delta.mul_(w)
    sign = elect_sign(deltas)
    total, divisor, agrees = (torch.zeros_like(base), torch.zeros_like(base), torch.empty_like(base))
    for delta, w in zip(deltas, weight, strict=True):
        torch.mul(delta, sign, out=agrees)
        torch.gt(agrees, 0, out=agrees)
        total.add_(delta.mul_(agrees))
        if normalize:
            divisor.add_(agrees.mul_(w))
    if normalize:
        torch.lt(torch.abs(divisor, out=agrees), _NO_WEIGHT, out=agrees)
        divisor.add_(agrees)
        total.div_(divisor)
    return base.add_(total.mul_(lambda_))


def elect_sign(deltas: Sequence[Tensor]) -> Tensor:
    """Return the sign of the sum of the deltas, +1 or -1, for each element; 0 counts as plus."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    return torch.ge(total, 0, out=total).mul_(2).sub_(1)
