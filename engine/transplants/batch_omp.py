"""Orthogonal matching pursuit with the inner products of all shared rows: Batch-OMP.

Source: Rubinstein, Zibulevsky, Elad, "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching
Pursuit", 2008. Correlations with what is left of y are ``X y - sum_A c_i X x_i``: rows of the Gram matrix X Xᵀ
instead of a product with X a step. These only say which rows may be the best, by a bound of their rounding; among them
it is found by <r, x_j> in float64, r from an orthonormal basis of A in float64. So what is chosen hangs on neither
rounding nor batch (decided 2026-11-30).

The Gram matrix lies in a file without a name that the tasks of a process share (gram_file.py), and a target's rows of
it in memory. A native loop pursues one target after the other (tensors/pursuit.c), and goes over these rows once for
eight steps instead of once a step, which are tried among few rows first and then checked among all. So what is chosen
does not change by it. Without it the same is done below, with NumPy; sums of float64 are taken in the same lanes either
way, so every processor has the same weights to the last bit (decided 2026-11-30).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.pursuit import Doubles, Floats, Numbers, Pursuer
from mergemill.engine.transplants.gram_file import ONE, Cosines, GramFile, count_summed, multiply, unit_rows
from mergemill.engine.transplants.omp import LEAST
from mergemill.engine.transplants.streams import NONE, Combination, Passes

AT_ONCE = 128  # targets whose correlations are made together
_ROUNDING = 2.0**-24 * 1.25  # of float32, and of what bounds it
_MUCH = 0.5  # of a square
_STEP = 1024  # rows at once
_LANES = 16  # of a sum, as pursuit.c has them

Shorts = np.ndarray[tuple[int, ...], np.dtype[np.uint16]]


@dataclass(frozen=True, slots=True, eq=False)
class Atoms:
    """The shared rows, held, and the products of all with all."""

    rows: Tensor  # [rows, width], as they are stored
    stored: Shorts | Floats  # the same; of bfloat16 the bits, which NumPy has no number for
    lengths: Floats  # [rows]; NaN for what has values that are no numbers
    inverse: Tensor  # [rows]: of the lengths, 0 where there is none
    gram: GramFile

    def take(self, numbers: Sequence[int]) -> Doubles:
        """Return rows in float64."""
        few = self.stored[numbers[0] : numbers[0] + 1] if len(numbers) == 1 else self.stored[numbers]  # mostly one
        if self.rows.dtype == torch.bfloat16:
            few = (few.astype(np.uint32) << 16).view(np.float32)
        return few.astype(np.float64)


class Room:
    """What a pursuit without the native loop works in, one target after the other."""

    def __init__(self, k: int, atoms: Atoms) -> None:
        rows, width = atoms.rows.shape
        self.basis = np.empty((k, width))  # orthonormal, of the rows taken
        self.inverse = np.zeros((k, k))  # the rows taken are Rᵀ · basis, and this is R⁻ᵀ
        self.cosines = np.empty((k, rows), np.int16)  # of the rows taken with all


def pursue_by_gram(targets: Tensor, atoms: Atoms, k: int) -> Combination:
    """Return each of `targets`, ``[new, width]``, float32, as a sum of at most k shared rows, as `pursue` does."""
    count, width = targets.shape
    unsure = _ROUNDING * (count_summed(width) + k + 16)
    if native.load() is not None:
        pursue = Pursuer(atoms.rows, atoms.lengths, atoms.gram.descriptor, k, unsure).pursue
    else:
        pursue = functools.partial(_pursue_one, atoms=atoms, room=Room(k, atoms), unsure=unsure)
    numbers = torch.full((count, k), NONE, dtype=torch.int64)
    weights = torch.zeros(count, k, dtype=torch.float64)
    for first in range(0, count, AT_ONCE):
        here = targets[first : first + AT_ONCE]
        starts = correlate(here, atoms).numpy()
        for i, (target, start) in enumerate(zip(here.double().numpy(), starts, strict=True), first):
            taken, shares = pursue(target, start)
            numbers[i, : len(taken)] = torch.from_numpy(taken)
            weights[i, : len(taken)] = torch.from_numpy(shares)
    return Combination(numbers, weights)


def hold_atoms(passes: Passes, width: int, stored: str, gram: GramFile) -> Atoms:
    """Return the rows that pass, ``[rows, width]``, in the dtype `stored`, which is theirs; fills their `gram`."""
    rows = torch.empty(gram.count, width, dtype=TORCH_DTYPES[stored])
    lengths = torch.empty(gram.count, dtype=torch.float64)
    for first, slab in passes():
        here = slice(first, first + len(slab))
        rows[here] = slab
        lengths[here] = slab.double().norm(dim=1)
    lengths = torch.where(lengths.float().isfinite(), lengths, torch.nan)
    inverse = (1 / lengths).nan_to_num(0.0, 0.0, 0.0).float()
    gram.fill(rows, inverse)
    is_bf16 = rows.dtype == torch.bfloat16
    stored_rows = rows.view(torch.int16).numpy().view(np.uint16) if is_bf16 else rows.numpy()
    return Atoms(rows, stored_rows, lengths.float().numpy(), inverse, gram)


def correlate(targets: Tensor, atoms: Atoms) -> Tensor:
    """Return the products of targets with rows over their lengths, ``[targets, rows]``, float32."""
    found = torch.empty(len(targets), len(atoms.rows))
    for first in range(0, len(atoms.rows), _STEP):
        rows = unit_rows(atoms.rows, atoms.inverse, first, _STEP)
        multiply(targets, rows, found[:, first : first + _STEP])
    return found


def _pursue_one(target: Doubles, start: Floats, atoms: Atoms, room: Room, unsure: float) -> tuple[Numbers, Doubles]:
    """Return the numbers of the rows of one target, in the order in which they were taken, and their weights."""
    left, length = target.copy(), _find_length(target)
    k = len(room.basis)
    weights, lengths, taken = np.zeros(k), np.zeros(k), list[int]()
    for step in range(k):
        if not _find_length(left) > LEAST * length:
            break
        shares = weights[:step] * lengths[:step]
        explains = float(np.abs(shares).sum())
        slack = unsure * (length + explains) + explains / ONE
        cosines = _correlate_left(start, (shares / ONE).astype(np.float32), room.cosines)
        best, row = _choose(_find_largest(cosines, slack, atoms.lengths), taken, left, atoms)
        if best == NONE:
            break
        part, shares = _take_off(row, room.basis[:step])
        lengths[step], size = _find_length(row), _find_length(part)
        if not size > LEAST * lengths[step]:
            break
        part /= size
        explained = multiply_rows(part, left)
        left -= explained * part
        room.basis[step] = part
        column = room.inverse[step]
        column[:] = 0.0
        for i, share in enumerate(shares):
            column[: i + 1] += -share / size * room.inverse[i, : i + 1]
        column[step] = 1 / size
        weights[: step + 1] += explained * column[: step + 1]
        taken.append(best)
        if step + 1 < k:
            atoms.gram.read(best, room.cosines[step])
    return np.array(taken, np.int64), weights[: len(taken)]


def _choose(near: Numbers, taken: Sequence[int], left: Doubles, atoms: Atoms) -> tuple[int, Doubles]:
    """Return the one of `near` of largest ``|<left, row>|`` that is not taken, of equals the first, and its row."""
    free = [each for each in near.tolist() if each not in taken]
    if not free:
        return NONE, left
    rows = atoms.take(free)
    best = 0 if len(free) == 1 else int(np.abs(multiply_rows(rows, left)).argmax())
    return free[best], rows[best]


def multiply_rows(rows: Doubles, other: Doubles) -> Any:
    """Return the product of each row, ``[..., width]``, with another, in the native loop's order of additions."""
    products = rows * other
    whole = products.shape[-1] // _LANES * _LANES
    lanes = products[..., :whole].reshape(*products.shape[:-1], whole // _LANES, 4, _LANES // 4)
    sums = np.add.reduce(lanes, axis=-3)  # one after the other: along an axis that is not the last
    four = (sums[..., 0, :] + sums[..., 1, :]) + (sums[..., 2, :] + sums[..., 3, :])
    total = (four[..., 0] + four[..., 1]) + (four[..., 2] + four[..., 3])
    for i in range(whole, products.shape[-1]):
        total = total + products[..., i]
    return total


def _find_length(row: Doubles) -> float:
    return math.sqrt(multiply_rows(row, row))


def _take_off(row: Doubles, basis: Doubles) -> tuple[Doubles, Doubles]:
    """Return what of a row is orthogonal to the basis, and its shares in it; again where much was taken off."""
    part, shares = _take_off_once(row, basis)
    if multiply_rows(part, part) < _MUCH * multiply_rows(row, row):  # rounding has left more than there should be
        part, more = _take_off_once(part, basis)
        shares += more
    return part, shares


def _take_off_once(row: Doubles, basis: Doubles) -> tuple[Doubles, Doubles]:
    part, shares = row.copy(), multiply_rows(basis, row)
    whole = len(basis) // 4 * 4
    for i in range(0, whole, 4):
        a, b, c, d = shares[i : i + 4, None] * basis[i : i + 4]
        part -= (a + b) + (c + d)
    for i in range(whole, len(basis)):
        part -= shares[i] * basis[i]
    return part, shares


def _correlate_left(start: Floats, shares: Floats, cosines: Cosines) -> Floats:
    """Return ``|start - shares · cosines|``, some rows at a time."""
    found = start.copy()
    for first in range(0, len(start), _STEP):
        here = slice(first, first + _STEP)
        found[here] -= shares @ cosines[: len(shares), here].astype(np.float32)
    return np.abs(found)


def _find_largest(cosines: Floats, slack: float, lengths: Floats) -> Numbers:
    """Return the numbers of the rows whose ``cosine · length`` may be the largest, ascending.

    The cosines are known to within `slack`.
    """
    least = np.nan_to_num((cosines - slack) * lengths, nan=-1.0).max(initial=0.0)
    return np.flatnonzero((cosines + slack) * lengths >= least)
