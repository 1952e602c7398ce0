"""Sums that come out the same to the bit, whatever the slabs, the workers and their order.

Inside a block of 65,536 elements the order of additions is fixed here (64 rows of 1,024 lanes added one after the
other, then 32 rows of 32), with plain float64 additions only: no library's own reduction, whose order follows the
width of the machine's vector registers. Block sums are then added as integers, exactly, so their order is free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.device import add_rows, is_on_host, to_host
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.slabs import BLOCK

# float64 values are integers times 2**-1074; 53 more bits keep every shift below non-negative.
_SHIFT = 1074 + 53


@dataclass(frozen=True, slots=True)
class ExactSum:
    """A sum of float64 values without rounding; `float()` rounds it once."""

    scaled: int = 0  # the sum of the finite values, times 2**1127
    stray: float = 0.0  # the sum of the infinities and NaNs

    def __add__(self, other: "ExactSum") -> "ExactSum":
        return ExactSum(self.scaled + other.scaled, self.stray + other.stray)

    def __float__(self) -> float:
        if self.stray:
            return self.stray
        try:
            return self.scaled / (1 << _SHIFT)
        except OverflowError:
            return math.inf if self.scaled > 0 else -math.inf


@dataclass(frozen=True, slots=True)
class Extremes:
    """The least and the largest of some values; of two such, the sum is that of all the values.

    Of values of which one is no number neither is one, in whatever order they are added (decided 2026-11-29).
    """

    least: float = math.inf
    most: float = -math.inf

    def __add__(self, other: "Extremes") -> "Extremes":
        if math.isnan(self.least) or math.isnan(other.least):
            return Extremes(math.nan, math.nan)
        return Extremes(min(self.least, other.least), max(self.most, other.most))


def find_extremes(values: Tensor) -> Extremes:
    """Return the least and the largest of a slab that is not empty.

    >>> find_extremes(torch.tensor([2.0, -1.0])) + Extremes()
    Extremes(least=-1.0, most=2.0)
    """
    least, most = values.aminmax()
    return Extremes(float(least), float(most))


def exact(value: float) -> ExactSum:
    """Return `value` as a sum of one.

    >>> float(exact(1e300) + exact(1.0) + exact(-1e300))
    1.0
    """
    return ExactSum(_scale(value)) if math.isfinite(value) else ExactSum(0, value)


def _scale(value: float) -> int:
    """Return a finite value times 2**1127, which is an integer."""
    mantissa, exponent = math.frexp(value)
    return int(mantissa * (1 << 53)) << (exponent - 53 + _SHIFT)


def sum_blocks(values: Tensor, block: int = BLOCK) -> ExactSum:
    """Return the sum of a flat float64 slab that begins at a multiple of `block` in its own tensor."""
    if not is_on_host(values):
        return sum_lanes(_add_blocks_there(values, block))
    flat = values.numpy()
    if block == BLOCK:
        return _sum_block(flat)
    starts = range(0, len(flat), block)
    return reduce(ExactSum.__add__, (_sum_block(flat[start : start + block]) for start in starts), ExactSum())


def _sum_block(flat: np.ndarray[Any, np.dtype[np.float64]]) -> ExactSum:
    whole = len(flat) // BLOCK * BLOCK
    total = _sum_whole_blocks(flat[:whole])
    if whole == len(flat):
        return total
    padded = np.zeros(BLOCK)
    padded[: len(flat) - whole] = flat[whole:]
    return total + _sum_whole_blocks(padded)


def _sum_whole_blocks(flat: np.ndarray[Any, np.dtype[np.float64]]) -> ExactSum:
    # Along any axis but the last, numpy adds whole rows one after the other: a fixed order on every machine.
    with np.errstate(all="ignore"):
        lanes = np.add.reduce(flat.reshape(-1, 64, 1024), axis=1)
        lanes = np.add.reduce(lanes.reshape(-1, 32, 32), axis=1)
    return sum_lanes(lanes)


def _add_blocks_there(values: Tensor, block: int) -> native.Sums:
    """Return the sums of each block ``[cut, 32]`` of a slab on a device, added there in the same order."""
    cuts = count_cuts(len(values), block)
    padded = values
    if block % BLOCK or len(values) % BLOCK:
        padded = values.new_zeros(cuts * BLOCK)
        for first, cut in zip(range(0, len(values), block), range(0, cuts, -(-block // BLOCK)), strict=True):
            here = values[first : first + block]
            padded[cut * BLOCK : cut * BLOCK + len(here)].copy_(here)
    lanes = add_rows(padded.view(cuts, 64, 1024).transpose(0, 1))
    sums: native.Sums = to_host(add_rows(lanes.view(cuts, 32, 32).transpose(0, 1)))
    return sums


def add_up(values: Sequence[float]) -> float:
    """Return the sum, rounded once."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # infinities of both signs, or a sum beyond float64
        return float(sum(values))


def sum_absolute(slab: Tensor, block: int = BLOCK) -> ExactSum:
    """Return the sum of |x| of a flat slab, in float64."""
    if native.suits(slab):
        return sum_lanes(native.sum_absolute(slab, block, count_cuts(len(slab), block)))
    return sum_blocks(slab.abs().to(torch.float64), block)


def sum_products(left: Tensor, right: Tensor, block: int = BLOCK) -> ExactSum:
    """Return the inner product of two flat slabs of one dtype, in float64."""
    if native.suits(left, right):
        return sum_lanes(native.sum_products(left, right, block, count_cuts(len(left), block)))
    return sum_blocks(left.to(torch.float64) * right.to(torch.float64), block)


def count_cuts(size: int, block: int) -> int:
    """Into how many sums a slab is cut: at multiples of `block`, and these at multiples of `BLOCK`."""
    whole, rest = divmod(size, block)
    return whole * -(-block // BLOCK) + -(-rest // BLOCK)


def sum_lanes(lanes: native.Sums) -> ExactSum:
    """Return the sum of the sums of blocks ``[cut, 32]``, each of which is rounded once."""
    sums = [add_up(each) for each in lanes.tolist()]
    if all(map(math.isfinite, sums)):
        return ExactSum(sum(map(_scale, sums)))
    return reduce(ExactSum.__add__, map(exact, sums), ExactSum())


def sum_rows(values: Tensor) -> Tensor:
    """Return the sum of each row of float64 `values` ``[r, c]`` as ``[r]``; they are overwritten.

    The right half of every row is added to its left half until one column is left: element by element, in an order
    that depends on c alone.
    """
    width = values.shape[1]
    while width > 1:
        half = -(-width // 2)
        values[:, : width - half].add_(values[:, half:width])
        width = half
    return values[:, 0].clone()
