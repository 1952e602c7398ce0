"""Weighted sums of slabs, as torch does them; `native` has the same loops.

An input whose weight is 0 has no part in a sum: no infinity of it, nor the sign of one of its zeros. So it need not be
read either, and what comes out has the same bytes.
"""

from collections.abc import Callable, Sequence

from mergemill.engine.tensors.lazy import Tensor, torch


def multiply(tensor: Tensor, factor: float) -> Tensor:
    """Multiply a tensor in place."""
    return tensor.mul_(factor)


def sum_weighted(
    tensors: Sequence[Tensor], weight: Sequence[float], multiply: Callable[[Tensor, float], Tensor] = multiply
) -> Tensor:
    """Return ``sum(weight[i] · tensors[i])``, all ``[n]``, in the memory of one of them; all are overwritten."""
    info = torch.finfo(tensors[0].dtype)
    nothing = info.smallest_normal * info.eps / 2  # what the dtype rounds to 0
    parts = [(tensor, w) for tensor, w in zip(tensors, weight, strict=True) if abs(w) > nothing]
    if not parts:
        return tensors[0].zero_()
    total = multiply(*parts[0])
    for tensor, w in parts[1:]:
        total.add_(multiply(tensor, w))
    return total
