"""The best product of two thin matrices for a matrix: what an adapter holds of a change, cut from it in a few passes.

With D = U S Vᵀ of rank r the best product is U_r S_r V_rᵀ. Three ways lead there, all in float64:

* ``gram`` (the default): the Gram matrix of D's smaller side, added up over blocks of rows in their order; its leading
  eigenvectors are the vectors of that side, and one more pass multiplies D by them. Memory: 8·min(m, n)² bytes.
* ``exact``: the singular value decomposition of the whole.
* ``randomized``: a few passes of subspace iteration with a block of r + 16 vectors, where neither fits: of flat
  spectra, as fine-tunes have them, it is about 1 % worse than the best (Halko et al., arXiv:0909.4061, 4.4).

Blocks of rows hang on the shape alone, so neither memory nor workers show in the result. Signs: the element of each
row of A that is largest is positive. Sides: A carries the vectors of what goes in, B those of what comes out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.leading import find_leading, leading_bytes

Way = Literal["gram", "exact", "randomized"]
Rows = Callable[[int, int], Tensor]  # gives D's rows from … to, float64, to be overwritten by nobody

STEP = 1 << 20  # elements of D that are multiplied at once
_HELD = (1 << 22, 1 << 25)  # elements of a wide D that are held while the others pass, at least and at most
_BESIDE = 16  # vectors of a random block beyond those that are wanted
_PASSES = 3
_PARTS = 4  # that a Gram matrix is calculated in, so that its lower half is not


class Shape(NamedTuple):
    """Of the matrix that is cut."""

    rows: int
    columns: int

    @property
    def is_wide(self) -> bool:
        """Whether rows are the smaller side."""
        return self.rows < self.columns

    @property
    def smaller(self) -> int:
        """The length of the smaller side: the most that a rank can be."""
        return min(self)

    @property
    def step(self) -> int:
        """How many rows are multiplied at once."""
        return max(1, min(self.rows, STEP // self.columns))

    @property
    def held(self) -> int:
        """How many rows of a wide matrix are held at once."""
        least, most = _HELD
        return max(1, min(self.rows, max(least, min(most, self.rows * self.columns // 4)) // self.columns))


@dataclass(frozen=True, slots=True)
class RankCut:
    """A matrix of a lower rank, D ≈ left · diag(values) · rightᵀ, and what of D it keeps."""

    left: Tensor  # [rows, rank], float64; vectors of length 1, or 0 where a value is
    values: Tensor  # [rank], largest first
    right: Tensor  # [columns, rank]
    squares: float  # ‖D‖²

    @property
    def lost(self) -> float:
        """‖D − cut‖²."""
        return max(0.0, self.squares - float(self.values.square().sum()))


def cut(rows: Rows, shape: Shape, rank: int, way: Way) -> RankCut:
    """Return the best product of `rank` for a matrix of which `rows` gives rows; see the module for the ways."""
    if way == "exact":
        left, values, right = torch.linalg.svd(rows(0, shape.rows), full_matrices=False)
        squares = float(values.square().sum())
        return RankCut(left[:, :rank], values[:rank], right[:rank].T, squares)
    if way == "randomized":
        return _cut_randomly(rows, shape, rank)
    gram = make_gram(rows, shape)
    return _project(rows, shape, find_leading(gram, rank), float(gram.trace()))


def make_gram(rows: Rows, shape: Shape) -> Tensor:
    """Return the Gram matrix of the smaller side, float64: DᵀD, or DDᵀ of a wide matrix."""
    gram = torch.zeros(shape.smaller, shape.smaller, dtype=torch.float64)
    if not shape.is_wide:
        for start, stop in _iter_steps(0, shape.rows, shape.step):
            _add_gram(gram, rows(start, stop))
    else:
        for first, last in _iter_steps(0, shape.rows, shape.held):
            held = torch.empty(last - first, shape.columns, dtype=torch.float64)
            for start, stop in _iter_steps(first, last, shape.step):
                held[start - first : stop - first] = rows(start, stop)
            _add_gram(gram[first:last, first:last], held.T)
            for start, stop in _iter_steps(last, shape.rows, shape.step):
                gram[first:last, start:stop] = held @ rows(start, stop).T
    whole: Tensor = gram.triu_().add_(gram.triu(1).T)
    return whole


def find_values(gram: Tensor) -> Tensor:
    """Return the singular values of the matrix whose Gram matrix this is, largest first."""
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_(min=0.0).sqrt_().flip(0)


def cut_bytes(shape: Shape, rank: int, way: Way) -> int:
    """Return an upper bound of what `cut` allocates, with the largest block of rows that it asks for, in float64."""
    rows, columns = shape
    factors = 8 * 4 * (rows + columns) * (rank + _BESIDE)
    if way == "exact":
        return factors + 8 * (5 * rows * columns + 4 * shape.smaller**2)
    block = 8 * 2 * shape.step * columns
    if way == "randomized":
        return factors + block
    held = 8 * shape.held * columns if shape.is_wide else 0
    gram = 8 * shape.smaller**2
    return factors + block + gram + max(held + 2 * gram, leading_bytes(shape.smaller, rank))


def spectrum_bytes(shape: Shape) -> int:
    """Return an upper bound of what `make_gram` and `find_values` allocate."""
    return cut_bytes(shape, 0, "gram") + 8 * 3 * shape.smaller**2


def _add_gram(gram: Tensor, block: Tensor) -> None:
    """Add blockᵀ · block to the upper half of a Gram matrix."""
    size = len(gram)
    for start, stop in _iter_steps(0, size, max(64, -(-size // _PARTS))):
        gram[start:stop, start:] += block[:, start:stop].T @ block[:, start:]


def _project(rows: Rows, shape: Shape, vectors: Tensor, squares: float) -> RankCut:
    """Return the cut of which the vectors of the smaller side are known: D times these has the others."""
    rank = vectors.shape[1]
    if shape.is_wide:
        other = torch.zeros(shape.columns, rank, dtype=torch.float64)
        for start, stop in _iter_steps(0, shape.rows, shape.step):
            other += rows(start, stop).T @ vectors[start:stop]
    else:
        other = torch.empty(shape.rows, rank, dtype=torch.float64)
        for start, stop in _iter_steps(0, shape.rows, shape.step):
            other[start:stop] = rows(start, stop) @ vectors
    values = other.square().sum(0).sqrt()
    other = other / torch.where(values > 0, values, 1.0)
    return RankCut(vectors, values, other, squares) if shape.is_wide else RankCut(other, values, vectors, squares)


def _cut_randomly(rows: Rows, shape: Shape, rank: int) -> RankCut:
    random = torch.Generator().manual_seed(0)
    width = min(rank + _BESIDE, shape.smaller)
    block = torch.linalg.qr(torch.randn(shape.columns, width, generator=random, dtype=torch.float64))[0]
    for _ in range(_PASSES):
        product = torch.zeros_like(block)
        for start, stop in _iter_steps(0, shape.rows, shape.step):
            taken = rows(start, stop)
            product += taken.T @ (taken @ block)
        block = torch.linalg.qr(product)[0]
    found, squares = torch.empty(shape.rows, width, dtype=torch.float64), 0.0
    for start, stop in _iter_steps(0, shape.rows, shape.step):
        taken = rows(start, stop)
        found[start:stop] = taken @ block
        squares += float(taken.square().sum())
    turn = torch.linalg.eigh(found.T @ found)[1].flip(1)[:, :rank]
    found = found @ turn
    values = found.square().sum(0).sqrt()
    return RankCut(found / torch.where(values > 0, values, 1.0), values, block @ turn, squares)


def _iter_steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of at most `step` from start to stop."""
    yield from ((at, min(at + step, stop)) for at in range(start, stop, step))
