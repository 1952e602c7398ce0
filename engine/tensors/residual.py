"""What is left of a weight when an adapter that was begun inside it is loaded: W less what the factors were begun as.

* PiSSA (Meng et al., arXiv:2404.02948, eq. 2): the adapter begins as the r leading singular directions of W, which are
  taken out of it: W − U_r S_r V_rᵀ, whatever the scale of the adapter is.
* OLoRA (Büyükakyüz, arXiv:2406.01775): it begins as the first r columns and rows of W = QR: W − s · Q_r R_r. Q_r comes
  of the first r columns of W alone, and R_r = Q_rᵀ W.

peft makes both anew of the base whenever it loads such an adapter, in float32. Here they are made in float64 and taken
out before the weight is rounded for the first time. The singular vectors are all eigenvectors of the Gram matrix of the
smaller side (`cuts.py`): what finds the leading ones alone is as good an approximation, but not the same one, where
singular values are close. A weight whose r-th and next are equal has no one residual, and any is given, as by peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergemill.engine.tensors.cuts import STEP, Rows, Shape, make_gram, spectrum_bytes
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.low_rank import Changed
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned

Beginning = Literal["pissa", "olora"]


@dataclass(frozen=True, slots=True)
class ResidualWeight(Changed):
    """A matrix without what an adapter of this rank was begun as; found in a round that takes the matrix whole."""

    weight: Expression
    beginning: Beginning
    rank: int
    scale: float

    takes_matrices = True

    @property
    def block(self) -> int:
        """The whole matrix."""
        return max(1, self.size)

    @property
    def own_block(self) -> int:
        """The whole matrix."""
        return max(1, self.size)

    @property
    def matrix(self) -> Shape:
        """Rows and columns."""
        return Shape(*self.shape)

    def count_rounds(self) -> tuple[int, int]:
        """The weight's, and one."""
        usual, most = Expression.count_rounds(self)
        return usual + 1, most + 1

    def rounds(self) -> ExpressionRounds:
        """Yield the weight's rounds, and one for what is taken out."""
        weight = yield from self.weight.rounds()
        left, right = yield Round(_Beginnings(self, weight).gather)
        return ResidualSlabs(self, weight, left, right)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The weight's slab, the result, what is calculated and allocated, and a block of the product."""
        made = 8 * self.rank * (4 * self.matrix.rows + 4 * self.matrix.columns)
        if self.beginning == "pissa":
            made += spectrum_bytes(self.matrix)
        own = made + aligned(elements * item_bytes(dtype)) + 16 * max(STEP, self.matrix.columns)
        return self.weight.slab_bytes(elements, self.wide) + own

    @property
    def wide(self) -> str:
        """The dtype in which slabs of the weight are taken."""
        return "F64" if self.weight.dtype == "F64" else "F32"

    def describe(self) -> Mapping[str, Any]:
        """The weight, and what is taken out of it."""
        return {"residual": [self.weight.describe(), self.beginning, self.rank, self.scale]}


@dataclass(frozen=True, slots=True)
class _Beginnings:
    """Finds the two factors whose product is taken out, ``[rows, rank]`` and ``[columns, rank]``, float64."""

    made: ResidualWeight
    weight: Ready

    def gather(self, span: Span, work: Workspace, total: Partial) -> Partial:
        """Return both factors; the span is the whole matrix."""
        made, shape = self.made, self.made.matrix
        if span != Span(0, made.size):
            raise ValueError(f"a residual is found of a whole matrix, not of {span} (a fault of mergemill)")
        whole = self.weight.slab(span, work, made.wide).view(shape)

        def rows(start: int, stop: int) -> Tensor:
            return whole[start:stop].to(torch.float64)

        return _find_principal(rows, made) if made.beginning == "pissa" else _find_first(whole, rows, made)


def _find_principal(rows: Rows, made: ResidualWeight) -> Partial:
    shape = made.matrix
    known = torch.linalg.eigh(make_gram(rows, shape))[1][:, -made.rank :].contiguous()
    other = torch.zeros(max(shape), made.rank, dtype=torch.float64)  # the matrix times the vectors of its smaller side
    for start in range(0, shape.rows, shape.step):
        stop = min(start + shape.step, shape.rows)
        if shape.is_wide:
            other += rows(start, stop).T @ known[start:stop]
        else:
            other[start:stop] = rows(start, stop) @ known
    left, right = (known, other) if shape.is_wide else (other, known)
    return left.numpy(), right.numpy()


def _find_first(whole: Tensor, rows: Rows, made: ResidualWeight) -> Partial:
    shape = made.matrix
    left = torch.linalg.qr(whole[:, : made.rank].to(torch.float64))[0]
    right = torch.zeros(shape.columns, made.rank, dtype=torch.float64)
    for start in range(0, shape.rows, shape.step):
        stop = min(start + shape.step, shape.rows)
        right += rows(start, stop).T @ left[start:stop]
    return (left * made.scale).numpy(), right.numpy()


@dataclass(frozen=True, slots=True)
class ResidualSlabs(Plain):
    """A weight's slabs, less the product of two factors."""

    made: ResidualWeight
    weight: Ready
    left: Any  # [rows, rank], float64
    right: Any  # [columns, rank]

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`, subtracted in float64 and rounded once."""
        columns, step = self.made.matrix.columns, self.made.matrix.step
        slab = self.weight.slab(span, work, self.made.wide)
        left, right = torch.from_numpy(self.left), torch.from_numpy(self.right)
        for first in range(span.start // columns, -(-span.stop // columns), step):
            product = (left[first : first + step] @ right.T).view(-1)
            begin, end = max(span.start, first * columns), min(span.stop, first * columns + len(product))
            here = slab[begin - span.start : end - span.start]
            here.copy_(product[begin - first * columns : end - first * columns].neg_().add_(here))
        return slab if dtype == self.made.wide else work.take((span.size,), dtype).copy_(slab)
