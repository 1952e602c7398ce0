"""The two factors of an adapter as expressions: what is cut from a matrix is calculated once for both of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mergemill.engine.tensors.cuts import RankCut, Rows, Shape, Way, cut, cut_bytes
from mergemill.engine.tensors.drift import Drift, Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, Leaf, Read
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round, finish_rounds
from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span, iter_slabs
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, bytes_of

Side = Literal["A", "B"]
Found = tuple[Tensor, Tensor, Tensor]  # A, B, and ‖D‖² and what is lost of it


@dataclass(frozen=True, slots=True)
class FullDifference(Expression):
    """One tensor less another, in float32."""

    inputs: tuple[Expression, ...]
    dtype = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """That of both."""
        return self.inputs[0].shape

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what subtracts."""
        return Subtracted(self.dtype, inputs)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Both in float32, and the result."""
        return Expression.slab_bytes(self, elements, "F32") + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """Both."""
        return {"difference": [each.describe() for each in self.inputs]}


@dataclass(frozen=True, slots=True)
class Subtracted(Plain):
    """The slabs of a difference."""

    dtype: str
    inputs: tuple[Ready, ...]

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span, subtracted in float32, as `dtype`."""
        one, other = (each.slab(span, work, "F32") for each in self.inputs)
        one.sub_(other)
        return one if dtype == "F32" else work.take((span.size,), dtype).copy_(one)


class Factors(Protocol):
    """What gives both factors of a module; a frozen value that they share."""

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What it reads, whole."""

    @property
    def sides(self) -> Mapping[Side, tuple[int, int]]:
        """The shapes of the factors."""

    @property
    def own_bytes(self) -> int:
        """An upper bound of what it takes, of the workspace and beside it, but for the factors."""

    @property
    def tells_loss(self) -> bool:
        """Whether what is lost is known with them."""

    def describe(self) -> Mapping[str, Any]:
        """Return what the factors depend on, as JSON."""

    def compute(self, work: Workspace) -> Found:
        """Return both, float32, and for each matrix ‖D‖² and what is lost of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Halves:
    """A matrix, or several of one shape that lie one after the other, and how the two factors are cut from each.

    `turned`: it is stored [in, out], so that its rows belong to what goes in. `split`: each factor carries the root of
    the singular values; else A carries them, and B has columns of length 1.
    """

    matrix: Expression
    count: int
    shape: Shape
    rank: int
    way: Way = "gram"
    split: bool = True
    turned: bool = False

    tells_loss = True

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The matrix."""
        return (self.matrix,)

    @property
    def own_bytes(self) -> int:
        """What is calculated and allocated, and one step of the matrix."""
        return cut_bytes(self.shape, self.rank, self.way) + rows_bytes(self.matrix, self.shape, self.way)

    @property
    def sides(self) -> Mapping[Side, tuple[int, int]]:
        """The shapes of the factors: A ``[count · rank, in]``, B ``[out, rank · count]``, the matrices side by side."""
        into, out = self.shape if self.turned else (self.shape.columns, self.shape.rows)
        return {"A": (self.count * self.rank, into), "B": (out, self.rank * self.count)}

    def describe(self) -> Mapping[str, Any]:
        """All of it."""
        cut_as = [self.count, *self.shape, self.rank, self.way, self.split, self.turned]
        return {"matrix": self.matrix.describe(), "cut": cut_as}

    def compute(self, work: Workspace) -> Found:
        """Return both factors, float32, and for each matrix ‖D‖² and what is lost of it."""
        sides = self.sides
        a = torch.zeros(self.count, self.rank, sides["A"][1])
        b = torch.zeros(sides["B"][0], self.rank, self.count)
        rank = min(self.rank, self.shape.smaller)  # what is asked for beyond that is zero
        squares = torch.empty(self.count, 2, dtype=torch.float64)
        ready = settle_whole(self.matrix, work)
        for number in range(self.count):
            found = cut(read_rows(ready, self.matrix, self.shape, number, work), self.shape, rank, self.way)
            into, out = self._scale(found)
            a[number, :rank], b[:, :rank, number] = into.T, out
            squares[number] = torch.tensor([found.squares, found.lost])
        return a.view(sides["A"]), b.view(sides["B"]), squares

    def _scale(self, found: RankCut) -> tuple[Tensor, Tensor]:
        into, out = (found.left, found.right) if self.turned else (found.right, found.left)
        largest = into.gather(0, into.abs().argmax(0, keepdim=True))
        signs = torch.where(largest < 0, -1.0, 1.0).to(into.dtype)
        roots = found.values.sqrt() if self.split else found.values
        return into * (signs * roots), out * (signs * found.values.sqrt() if self.split else signs)


@dataclass(frozen=True, slots=True)
class Thin(Expression):
    """One of the two factors; the task that writes one writes the other, and calculates both once."""

    of: Factors
    side: Side
    shape: tuple[int, ...]  # a view of the side's own
    transposed: bool = False  # for the linear layer that is tied to an embedding
    dtype = "F32"

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What is read for both."""
        return self.of.inputs

    @property
    def block(self) -> int:
        """The whole tensor."""
        return max(1, self.size)

    @property
    def grain(self) -> int:
        """Any."""
        return 1

    @property
    def is_merged(self) -> bool:
        """It is calculated; of one factor's receipt the guard learns how much is lost."""
        return self.side == "A" and not self.transposed and self.of.tells_loss

    @property
    def made_with(self) -> object:
        """The other factor."""
        return self.of

    def count_rounds(self) -> tuple[int, int]:
        """None of its own, since it goes over its input itself; more than one pass, so that what was read is kept."""
        return 0, 1

    def rounds(self) -> ExpressionRounds:
        """It goes over its input itself, whose spans are not its own."""
        yield from ()
        return ThinReady(self)

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield all that is read for both, whatever the span."""
        for each in self.of.inputs:
            yield from each.reads(Span(0, each.size))

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield all that these need whole."""
        for each in self.of.inputs:
            yield from each.holds(Span(0, each.size))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """What is calculated and allocated for it, and both factors."""
        factors = 2 * sum(4 * a * b for a, b in self.of.sides.values())
        return self.of.own_bytes + factors + aligned(elements * item_bytes(dtype))

    def suits_device(self, device: str) -> bool:
        """None yet."""
        return False

    def describe(self) -> Mapping[str, Any]:
        """The cut, and which of its factors this is."""
        return {"thin": self.of.describe(), "side": self.side, "shape": list(self.shape), "t": self.transposed}


@dataclass(frozen=True, slots=True)
class ThinReady(Plain):
    """A factor that is calculated when it is asked for."""

    made: Thin

    @property
    def dtype(self) -> str:
        """Float32."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`."""
        of = self.made.of
        a, b, squares = work.results.find(of, lambda: of.compute(work))
        work.next_slab()
        if isinstance(watch, LossWatch):
            watch.see(squares)
        own = a if self.made.side == "A" else b
        found = (own.T if self.made.transposed else own).reshape(-1)[span.start : span.stop]
        return work.take((span.size,), dtype).copy_(found)

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes as `dtype`; `watch` sees what was lost, and what a cast breaks."""
        cast = self.slab(span, work, dtype, watch)
        if watch is not None:
            watch.check(cast)
        return bytes_of(cast)

    def make_watch(self, dtype: str) -> Watch | None:
        """Return what sees how much of the matrix is lost."""
        return LossWatch() if self.made.is_merged else Plain.make_watch(self, dtype)


class LossWatch(Watch):
    """Sees a cut: its drift is ‖D − cut‖² beside ‖D‖², so that the change of a tensor is the relative error."""

    def __init__(self) -> None:
        super().__init__(BLOCK, deltas=False)
        self._seen: Tensor | None = None

    def see(self, squares: Tensor) -> None:
        """See ``[count, 2]``: of each matrix ‖D‖² and what is lost of it."""
        self._seen = squares.sum(0)

    def drift(self) -> Drift:
        """Return what was seen; nothing is compared with inputs."""
        whole, lost = (0.0, 0.0) if self._seen is None else self._seen.tolist()
        return Drift(super().drift().broken, lost, whole, ())


def settle_whole(matrix: Expression, work: Workspace) -> Ready:
    """Return a tensor that is ready, all its rounds gathered here, in spans of its own."""

    def gather(asked: Round) -> Partial:
        total: Partial = ()
        for span in iter_slabs(Span(0, matrix.size), SLAB, matrix.block):
            work.next_slab()
            total = asked.take(span, work, total)
        return total

    return finish_rounds(matrix.rounds(), (), gather)


def read_rows(ready: Ready, matrix: Expression, shape: Shape, number: int, work: Workspace) -> Rows:
    """Return what gives rows of one of the matrices that a tensor holds, in float64."""

    def rows(start: int, stop: int) -> Tensor:
        first = number * shape.rows * shape.columns
        wanted = Span(first + start * shape.columns, first + stop * shape.columns)
        span = _widen(matrix, wanted)
        work.next_slab()
        slab = ready.slab(span, work, "F32")[wanted.start - span.start : wanted.stop - span.start]
        return slab.view(-1, shape.columns).to(torch.float64)

    return rows


def rows_bytes(matrix: Expression, shape: Shape, way: Way) -> int:
    """Return an upper bound of what one step of `read_rows`, or of its rounds, takes of the workspace."""
    rows = shape.rows if way == "exact" else shape.step
    elements = min(rows * shape.columns + (0 if _is_there(matrix) else 2 * matrix.block), matrix.size)
    largest = max(elements, min(max(SLAB, matrix.block), matrix.size)) if matrix.count_rounds()[1] else elements
    return matrix.slab_bytes(largest, "F32")


def _is_there(matrix: Expression) -> bool:
    """Whether any of its elements can be had without others."""
    return all(isinstance(each, Leaf) for each in matrix.inputs) or isinstance(matrix, Leaf)


def _widen(matrix: Expression, span: Span) -> Span:
    if _is_there(matrix):
        return span
    block = matrix.block
    return Span(span.start // block * block, min(-(-span.stop // block) * block, matrix.size))
