"""Least squares over few rows for many targets at once, in float64."""

from mergemill.engine.tensors.lazy import Tensor, torch

_AT_ONCE = 8 << 20  # bytes of rows in float64
_REFINED = 2  # times: what the square of the condition has cost comes back


def solve_rows(rows: Tensor, used: Tensor, targets: Tensor) -> Tensor:
    """Return the weights of argmin ``|target - sum_j c_j rows_j|`` over the used rows, which are independent.

    Shapes: rows ``[new, terms, width]``, used ``[new, terms]``, targets ``[new, width]``; the result ``[new, terms]``,
    float64, 0 for what is not used. By the normal equations and their Cholesky factor, refined.
    """
    count, terms, width = rows.shape
    found = torch.zeros(count, terms, dtype=torch.float64)
    step = max(1, _AT_ONCE // max(1, 8 * terms * width))
    for first in range(0, count, step):
        here = slice(first, first + step)
        found[here] = _solve(rows[here].double() * used[here][:, :, None], used[here], targets[here].double())
    return found


def _solve(rows: Tensor, used: Tensor, targets: Tensor) -> Tensor:
    gram = rows @ rows.mT + torch.diag_embed((~used).double())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():
        return solve_least(rows, targets)
    weights = torch.zeros(rows.shape[:2], dtype=torch.float64)
    for _ in range(1 + _REFINED):
        left = targets - (weights[:, None, :] @ rows)[:, 0]
        weights = weights + torch.cholesky_solve(rows @ left[:, :, None], factor)[:, :, 0]
    return weights


def solve_least(rows: Tensor, targets: Tensor) -> Tensor:
    """Return the weights of least norm among those of least squares; shapes as for `solve_rows`, float64."""
    found: Tensor = (torch.linalg.pinv(rows.mT) @ targets[:, :, None])[:, :, 0]
    return found


def solve_barycentric(rows: Tensor, targets: Tensor) -> Tensor:
    """Return the weights of least squares that add up to 1, by the bordered normal equations; shapes as before.

    Where the rows depend on each other, the solution of least norm.
    """
    count, terms, _ = rows.shape
    ones = torch.ones(count, terms, 1, dtype=torch.float64)
    gram = rows @ rows.mT
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)[:, None, None]  # so that the border is of its size
    upper = torch.cat([gram / scale, ones], 2)
    lower = torch.cat([ones.mT, torch.zeros(count, 1, 1, dtype=torch.float64)], 2)
    right = torch.cat([rows @ targets[:, :, None] / scale, torch.ones(count, 1, 1, dtype=torch.float64)], 1)
    found: Tensor = (torch.linalg.pinv(torch.cat([upper, lower], 1), hermitian=True) @ right)[:, :-1, 0]
    return found
