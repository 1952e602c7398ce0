"""How far a merged tensor drifts from its base, beside how far its inputs lie from it, and whether it is finite.

The base is the base model's tensor, or the first input where there is none. Every element is looked at for NaN and
infinities. Distances are taken from a sample, the first `SAMPLE` of each `BLOCK` elements (small tensors: all that they
have up to there), so that watching costs a few percent of a merge; the sums are exact, so that they are the same for
any slabs and parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from mergemill.engine.tensors import native
from mergemill.engine.tensors.device import add_rows, has_double, is_on_host, to_host
from mergemill.engine.tensors.dtypes import NAMES
from mergemill.engine.tensors.exact import ExactSum, add_up, count_cuts, exact
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.slabs import BLOCK

SAMPLE = 1024  # elements
_LANES = 32
# Sums of these overflow, or torch has none.
_NARROW = ("F16", "F8_E4M3", "F8_E5M2")

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drift:
    """What was seen of a tensor, or of a piece of it; drifts of pieces add up."""

    broken: int  # values that are not finite
    moved: float  # sampled ‖merged − base‖²
    base: float  # sampled ‖base‖²
    inputs: tuple[float, ...]  # sampled ‖Wᵢ − base‖² of each input


class Watch:
    """Watches one piece of a tensor as its slabs go by."""

    def __init__(self, block: int, *, deltas: bool) -> None:
        self._block = block  # of the tensor: its slabs begin at multiples
        self._deltas = deltas  # whether a kernel's inputs are differences to the base already
        self._broken = 0
        self._broken_there: list[Tensor] = []  # counted on a device
        self._squares: list[Sums | Tensor] = []  # a row for base, inputs and merged; a column for each chunk
        self._kept: npt.NDArray[Any] | Tensor | None = None  # the base's sample, [chunk, SAMPLE], float32 or float64

    def look(self, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        """See a slab's inputs before the kernel overwrites them."""
        subtract = base is None or not self._deltas
        slabs = [*tensors] if base is None else [base, *tensors]
        if not is_on_host(slabs[0]):
            self._look_there(slabs, subtract=subtract)
            return
        chunks = count_cuts(len(slabs[0]), self._block)
        squares = np.empty((len(slabs) + 1, chunks))
        if native.suits(*slabs):
            self._kept = np.empty((chunks, SAMPLE), np.float32)
            native.look(slabs, self._block, self._kept, squares[:-1], subtract=subtract)
        else:
            first, *others = (_take_sample(slab, self._block) for slab in slabs)
            self._kept = first
            squares[:-1] = _sum_squares(np.stack([first, *(x - first if subtract else x for x in others)]))
        self._squares.append(squares)

    def compare(self, merged: Tensor) -> None:
        """See what became of the slab."""
        assert self._kept is not None, "a slab is looked at before it is merged"
        moved: Any = self._squares[-1][-1]
        if not isinstance(self._kept, np.ndarray):
            moved.copy_(_sum_squares_there((_sample_there(merged, self._block) - self._kept)[None])[0])
            return
        if self._kept.dtype == np.float32 and native.suits(merged):
            native.compare(merged, self._block, self._kept, moved)
        else:
            moved[:] = _sum_squares((_take_sample(merged, self._block) - self._kept)[None])[0]

    def record(self, squares: Sums, broken: int) -> None:
        """See a slab that was merged in one go: its `squares` as `make_squares` gave them, filled, and what broke."""
        self._squares.append(squares)
        self._broken += broken

    def make_squares(self, size: int, rows: int) -> Sums:
        """Return room for a slab's sums: a row for the base, each input and the result, a column for each chunk."""
        return np.empty((rows, count_cuts(size, self._block)))

    def check(self, written: Tensor) -> None:
        """Count what is not finite in the slab as it is written."""
        if not is_on_host(written):
            self._broken_there.append((~torch.isfinite(written)).sum())
            return
        if native.suits_halves(written):
            self._broken += native.count_broken(written)
            return
        narrow = NAMES[written.dtype] in _NARROW
        # A sum is a tenth as costly as a look at each element, and finite only if all of them are.
        total = written.sum(dtype=torch.float32 if narrow else None)
        if not math.isfinite(total):
            values = written.to(torch.float32) if narrow else written
            self._broken += written.numel() - int(torch.isfinite(values).sum())

    def drift(self) -> Drift:
        """Return what was seen of the piece."""
        base, *inputs, moved = (add_up(row.tolist()) for row in self._rows()) if self._squares else (0.0, 0.0)
        return Drift(self._count_broken(), moved, base, tuple(inputs))

    def partial(self) -> tuple[int | ExactSum, ...]:
        """Return what adds up over pieces, exactly: see `make_drift`."""
        sums = (reduce(ExactSum.__add__, map(exact, row.tolist()), ExactSum()) for row in self._rows())
        return (self._count_broken(), *sums)

    def _look_there(self, slabs: Sequence[Tensor], *, subtract: bool) -> None:
        """See a slab on a device; what is seen stays there until the piece is done, so that nothing waits for it."""
        first, *others = (_sample_there(slab, self._block) for slab in slabs)
        squares = first.new_empty((len(slabs) + 1, len(first)))
        seen = torch.stack([first, *(x - first if subtract else x for x in others)])
        squares[:-1].copy_(_sum_squares_there(seen))
        self._kept = first
        self._squares.append(squares)

    def _count_broken(self) -> int:
        return self._broken + sum(int(count) for count in self._broken_there)

    def _rows(self) -> Sums:
        found = [each if isinstance(each, np.ndarray) else to_host(each) for each in self._squares]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found, axis=1) if found else np.zeros((0, 0))


def make_drifts(squares: Sums, broken: Sequence[int]) -> list[Drift]:
    """Return the drifts of whole tensors: of each its sums, as `Watch.make_squares` has them, and what broke."""
    rows = [[add_up(row) for row in of_one] for of_one in squares.tolist()]
    drifts = zip(broken, rows, strict=True)
    return [Drift(count, moved, base, tuple(inputs)) for count, (base, *inputs, moved) in drifts]


def make_drift(partial: Sequence[int | ExactSum]) -> Drift:
    """Return the drift of what `Watch.partial` gathered."""
    broken, *sums = partial
    base, *inputs, moved = [float(value) for value in sums] or [0.0, 0.0]
    return Drift(int(float(broken)), moved, base, tuple(inputs))


def _take_sample(slab: Tensor, block: int) -> Sums:
    """Return the slab's sampled elements as float64 ``[chunk, SAMPLE]``, filled up with zeros."""
    if block == BLOCK and len(slab) % BLOCK == 0:
        chunks: Sums = slab.view(-1, BLOCK)[:, :SAMPLE].to(torch.float64).numpy()
        return chunks
    starts = [
        start for first in range(0, len(slab), block) for start in range(first, min(first + block, len(slab)), BLOCK)
    ]
    sample = np.zeros((len(starts), SAMPLE))
    for row, start, stop in zip(sample, starts, [*starts[1:], len(slab)], strict=True):
        chunk = slab[start : min(start + SAMPLE, stop)]
        row[: len(chunk)] = chunk.to(torch.float64).numpy()
    return sample


def _sum_squares(samples: Sums) -> Sums:
    """Return for ``[what, chunk, SAMPLE]`` the sums of squares ``[what, chunk]``, added in one order everywhere."""
    with np.errstate(all="ignore"):
        lanes = np.add.reduce((samples * samples).reshape(*samples.shape[:2], -1, _LANES), axis=2)
        sums: Sums = lanes[..., 0].copy()
        for lane in range(1, _LANES):  # NumPy's own reduction goes in another order where there is one sum alone
            sums += lanes[..., lane]
    return sums


def _sample_there(slab: Tensor, block: int) -> Tensor:
    """The same where the slab lies; on the host, where it lies on a device that knows no float64."""
    if block > BLOCK:
        return torch.cat([_sample_there(part, BLOCK) for part in torch.split(slab, block)])
    whole = len(slab) // block * block
    blocks, tail = slab[:whole].view(-1, block)[:, :SAMPLE], slab[whole:][:SAMPLE]
    sample = slab.new_zeros((count_cuts(len(slab), block), SAMPLE))
    sample[: len(blocks), : blocks.shape[1]].copy_(blocks)
    if len(tail):
        sample[-1, : len(tail)].copy_(tail)
    return (sample if has_double(slab) else sample.cpu()).to(torch.float64)


def _sum_squares_there(samples: Tensor) -> Tensor:
    """The same additions as `_sum_squares`, where the samples lie."""
    squares = (samples * samples).view(*samples.shape[:2], -1, _LANES)
    return add_rows(add_rows(squares.movedim(2, 0)).movedim(2, 0))
