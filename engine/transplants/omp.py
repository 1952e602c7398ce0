"""Orthogonal matching pursuit: a new row as a sum of few shared ones, the same sum of the model's rows.

Source: arXiv:2506.06607, algorithm 1. Beginning with r = y, k times: the shared row x_j of largest |<r, x_j>| joins A,
of equals the first; r is what of y no sum of A reaches. Rows are not normalised. Residuals come from an orthonormal
basis of A in the rows' own precision; the weights, argmin |y - sum_A c_j x_j|, are solved in float64 at the end.

A library rounds the products of equal rows differently, by where in a matrix they lie: so equal rows are found by their
bytes, in a pass before, and the first of them stands for all (decided 2026-11-30).
"""

import numpy as np
import xxhash

from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.transplants.least_squares import solve_rows
from mergemill.engine.transplants.streams import NONE, Combination, Passes, gather_rows

LEAST = 1e-6  # of y, or of a row: what is less than that is nothing
_AT_ONCE = 64  # rows
_MUCH = 0.7


def pursue(targets: Tensor, passes: Passes, k: int) -> Combination:
    """Return each of `targets` as a sum of at most k shared rows.

    Shapes: targets ``[new, width]``; shared rows ``[rows, width]``. A pursuit ends before where the residual is under
    `LEAST` of the target, or the next row has less than that outside the span of those before.
    """
    count, width = targets.shape
    numbers = torch.full((count, k), NONE, dtype=torch.int64)
    basis = targets.new_zeros(k, count, width)
    left, lengths = targets.clone(), targets.norm(dim=1)
    going = torch.ones(count, dtype=torch.bool)
    firsts = find_firsts(passes)
    for step in range(k):
        going &= left.norm(dim=1) > LEAST * lengths
        if not going.any():
            break
        found, rows = find_best(left, passes, numbers[:, :step])
        part = _take_off(rows, basis[:step])
        size = part.norm(dim=1)
        going &= (found != NONE) & (size > LEAST * rows.norm(dim=1))
        part = torch.where(going[:, None], part / size[:, None], 0.0)
        basis[step] = part
        numbers[:, step] = torch.where(going, firsts[found], NONE)
        left -= (left * part).sum(1, keepdim=True) * part
    del basis
    return Combination(numbers, solve_rows(gather_rows(passes, numbers, width), numbers != NONE, targets))


def find_firsts(passes: Passes) -> Tensor:
    """Return for each row the number of the first that equals it, ``[rows]``."""
    digests = bytearray()
    for _, slab in passes():
        for row in slab.numpy():
            digests += xxhash.xxh3_128_digest(row + 0.0)  # of -0.0 a zero
    if not digests:
        return torch.tensor([NONE])
    _, firsts, places = np.unique(np.frombuffer(digests, "<u8,<u8"), return_index=True, return_inverse=True)
    return torch.from_numpy(firsts[places])


def find_best(left: Tensor, passes: Passes, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the row of largest ``|<left, row>|`` that is not `taken`, and the row, for each of `left`.

    `NONE` and zeros where there is none; what is no number is no row.
    """
    best = left.new_full((len(left),), -1.0)
    found, rows = torch.full((len(left),), NONE, dtype=torch.int64), torch.zeros_like(left)
    for first, slab in passes():
        scores = (left @ slab.T).abs_()
        new, term = ((taken >= first) & (taken < first + len(slab))).nonzero(as_tuple=True)
        scores[new, taken[new, term] - first] = -1.0
        top, at = scores.max(1)
        if not top.isfinite().all():
            top, at = torch.where(scores.isfinite(), scores, -1.0).max(1)
        better = (top > best).nonzero(as_tuple=True)[0]
        best[better], found[better], rows[better] = top[better], at[better] + first, slab[at[better]]
    return found, rows


def _take_off(rows: Tensor, basis: Tensor) -> Tensor:
    """Return of each row what is orthogonal to its basis, ``[terms, new, width]``; again where much was taken off.

    Some rows at a time, which lie in the core's cache: a library's product for each row alone took two thirds of a
    pursuit (measured 2026-11-29).
    """
    part = rows.clone()
    for first in range(0, len(rows), _AT_ONCE):
        here, own = part[first : first + _AT_ONCE], basis[:, first : first + _AT_ONCE]
        sizes = here.norm(dim=1)
        _take_off_once(here, own)
        if (here.norm(dim=1) < _MUCH * sizes).any():  # rounding has left more than there should be
            _take_off_once(here, own)
    return part


def _take_off_once(part: Tensor, basis: Tensor) -> None:
    for each in basis:
        part.addcmul_(each, (each * part).sum(1, keepdim=True), value=-1)
