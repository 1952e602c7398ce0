"""An expression as the bytes of a quantised format: codes, then scales, then what fills it up.

A weight and its scales are one tensor of bytes here (decided 2026-11-29): they lie side by side in a file, and are one
piece of work, so the weight is read, and merged, once for both. The scales of a slab are kept until they are written.
As separate tensors, all scales of a model would be one task that reads all of it. Where a tensor is too large for one
part, whoever writes its scales reads the weight again.
"""

import math
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from mergemill.engine.tensors.codes_made import Coding, find_coding
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.expressions import Expression, Leaf, Read
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round
from mergemill.engine.tensors.slabs import SLAB, Span, slab_step
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, tensor_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Quantized(Expression):
    """The bytes of a tensor in one of the `CODINGS`, seen flat."""

    inner: Expression
    coding: str
    filled_bytes: int = 0  # zeros at the end

    @property
    def shape(self) -> tuple[int, ...]:
        """One axis of bytes."""
        return (self.codes_bytes + self.scales_bytes + self.filled_bytes,)

    @property
    def dtype(self) -> str:
        """Bytes."""
        return "U8"

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What is quantised."""
        return (self.inner,)

    @property
    def how(self) -> Coding:
        """The coding."""
        return find_coding(self.coding)

    @property
    def rows(self) -> int:
        """Rows of a matrix."""
        return self.inner.shape[-2] if len(self.inner.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.inner.shape[-1] if self.inner.shape else 1

    @property
    def bands(self) -> int:
        """Of a matrix: groups of rows that share scales."""
        return -(-self.rows // self.how.band_rows)

    @property
    def codes_bytes(self) -> int:
        """All codes."""
        return self.inner.size // max(1, self.columns) * self.how.row_bytes(self.columns)

    @property
    def scales_bytes(self) -> int:
        """All scales."""
        return self.inner.size // max(1, self.rows * self.columns) * self.bands * self.how.band_bytes(self.columns)

    @property
    def own_elements(self) -> int:
        """Elements of a band, or of a matrix where bands do not divide it."""
        band = self.how.band_rows
        rows = band if self.rows % band == 0 or self.rows == self.inner.size // self.columns else self.rows
        return min(rows, self.rows) * self.columns

    @property
    def inner_block(self) -> int:
        """Elements that are quantised together, and at which what is quantised may be cut."""
        others = 1 if isinstance(self.inner, Leaf) else self.inner.block  # of what is there, any will do
        return max(1, min(math.lcm(self.own_elements, others), self.inner.size))

    @property
    def block(self) -> int:
        """The codes of an inner block."""
        return self._count_bytes(self.inner_block)

    @property
    def own_block(self) -> int:
        """The same."""
        return self.block

    @property
    def grain(self) -> int:
        """All of it, as far as parts may be so large: scales hang on codes."""
        return max(1, self.shape[0] if self.scales_bytes else self.block)

    @property
    def is_merged(self) -> bool:
        """Whether what is quantised is."""
        return self.inner.is_merged

    @property
    def made_with(self) -> object:
        """What that has in common with others."""
        return self.inner.made_with

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what the codes of the span read; scales are of the same."""
        return self.inner.reads(self.find_elements(span))

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what is held; of scales that another piece has the codes of, for all codes."""
        return self.inner.holds(Span(0, self.inner.size) if self._is_cut(span) else self.find_elements(span))

    def find_elements(self, span: Span) -> Span:
        """Return the elements whose codes are in a span of bytes."""
        start, stop = (min(at, self.codes_bytes) for at in (span.start, span.stop))
        row = max(1, self.how.row_bytes(self.columns))
        return Span(start // row * self.columns, stop // row * self.columns)

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what quantises."""
        return Quantizing(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """What is quantised, as float32; what coding it takes beside; its bytes; and all scales."""
        row = max(1, self.how.row_bytes(self.columns))
        inner = min(-(-elements // row) * self.columns, self.inner.size)
        beside = self.how.beside * (inner + self.how.band_rows * self.how.band_rows)
        slabs = self.inner.slab_bytes(inner, "F32") + aligned(4 * inner) + aligned(elements)
        return slabs + beside + aligned(self.scales_bytes) + 2 * self.count_bands()

    def step_bytes(self, elements: int, dtype: str) -> int:
        """The same for a slab; and where the scales of other pieces are made, for as much of the weight."""
        step = max(min(slab_step(SLAB, self.block), elements), min(self.block, self.codes_bytes))
        return self.slab_bytes(step, dtype)

    def suits_device(self, device: str) -> bool:
        """It is made on the CPU, and so is what is merged for it."""
        return False

    def makes_natively(self, dtype: str) -> bool:
        """It does not: torch does."""
        return False

    def with_factors(self, factors: Sequence[float]) -> Expression:
        """Return it with what is quantised so."""
        return replace(self, inner=self.inner.with_factors(factors))

    def rounds(self) -> ExpressionRounds:
        """Yield what is quantised's own, over its elements."""
        return self.get_ready(((yield from self._over_elements(self.inner.rounds())),))

    def square_rounds(self, count: int) -> Generator[Round, Partial, Partial]:
        """Yield what is quantised's own, over its elements."""
        return (yield from self._over_elements(self.inner.square_rounds(count)))

    def _over_elements(self, rounds: Generator[Round, Partial, T]) -> Generator[Round, Partial, T]:
        """Go through rounds of what is quantised; passes are over spans of bytes, one slab at a time."""
        try:
            asked = next(rounds)
            while True:
                asked = rounds.send((yield Round(_OverElements(self, asked))))
        except StopIteration as finished:
            found: T = finished.value
            return found

    def find_likeness(self) -> Hashable:
        """The coding, and what is quantised's own."""
        inner = self.inner.find_likeness()
        return None if inner is None else ("quantized", self.coding, self.filled_bytes, self.inner.shape, inner)

    def describe(self) -> Mapping[str, Any]:
        """The coding and what is quantised."""
        return {"quantized": self.inner.describe(), "as": self.coding, "filled": self.filled_bytes}

    def count_bands(self) -> int:
        """Return the bands of all matrices."""
        return self.inner.size // max(1, self.rows * self.columns) * self.bands

    def _count_bytes(self, elements: int) -> int:
        return elements // self.columns * self.how.row_bytes(self.columns)

    def _is_cut(self, span: Span) -> bool:
        return span.start > 0 and span.stop > self.codes_bytes


@dataclass(frozen=True, slots=True)
class _OverElements:
    """A pass over what is quantised, given spans of bytes."""

    made: Quantized
    asked: Round

    def __call__(self, span: Span, work: Workspace, total: Partial) -> Partial:
        elements = self.made.find_elements(span)
        return self.asked.take(elements, work, total) if elements.size else total


@dataclass(frozen=True, slots=True)
class _Scales:
    """The scales of a tensor, as far as they are known."""

    data: Arena
    known: np.ndarray[tuple[int], np.dtype[np.bool_]]  # by band


@dataclass(frozen=True, slots=True)
class Quantizing(Plain):
    """A tensor whose slabs are quantised, and which remembers their scales."""

    made: Quantized
    inner: Ready
    scales: list[_Scales] = field(default_factory=list)  # none before the first slab

    @property
    def dtype(self) -> str:
        """Bytes."""
        return "U8"

    @property
    def base(self) -> Ready:
        """The base, quantised."""
        return Quantizing(self.made, self.inner.base)

    def make_watch(self, dtype: str) -> Watch | None:
        """Return what sees what is quantised, where that is merged."""
        return self.inner.make_watch("F32") if self.made.is_merged else None

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's bytes as a tensor."""
        return tensor_of(self.encode(span, work, dtype, watch))

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes."""
        made, out = self.made, work.take_bytes(span.size)
        elements = made.find_elements(span)
        codes_bytes = max(0, min(span.stop, made.codes_bytes) - span.start)
        if elements.size:
            self._quantize(elements, work, out[:codes_bytes], watch)
        if span.stop > made.codes_bytes:
            self._finish(Span(max(span.start, made.codes_bytes), span.stop), work, out[codes_bytes:])
        return out

    def _quantize(self, elements: Span, work: Workspace, out: Arena | None, watch: Watch | None = None) -> None:
        """Code elements, and remember their scales; of whole bands, `out` has room for their codes."""
        made, how, columns = self.made, self.made.how, self.made.columns
        slab = self.inner.slab(elements, work, "F32", watch).view(-1, columns)
        row, at = elements.start // columns, 0
        while at < len(slab):
            matrix, inside = divmod(row + at, made.rows)
            count = min(len(slab) - at, made.rows - inside)
            codes, scales = how.make(slab[at : at + count])
            if out is not None:
                size = count * how.row_bytes(columns)
                out[at * how.row_bytes(columns) :][:size] = codes.numpy()
            if len(scales):
                self._remember(matrix * made.bands + inside // how.band_rows, scales.numpy())
            at += count

    def _remember(self, band: int, scales: Arena) -> None:
        each, kept = self.made.how.band_bytes(self.made.columns), self._keep()
        kept.data[band * each :][: len(scales)] = scales
        kept.known[band : band + len(scales) // each] = True

    def _keep(self) -> _Scales:
        if not self.scales:
            known = np.zeros(self.made.count_bands(), np.bool_)
            self.scales.append(_Scales(np.empty(self.made.scales_bytes, np.uint8), known))
        return self.scales[0]

    def _finish(self, span: Span, work: Workspace, out: Arena) -> None:
        """Fill in scales, and the zeros after them."""
        made, first = self.made, span.start - self.made.codes_bytes
        count = max(0, min(span.stop - made.codes_bytes, made.scales_bytes) - first)
        out[count:] = 0
        if not count:
            return
        each = made.how.band_bytes(made.columns)
        self._find_missing(first // each, -(-(first + count) // each), work)
        out[:count] = self._keep().data[first : first + count]

    def _find_missing(self, first: int, last: int, work: Workspace) -> None:
        """Quantise again what has scales in bands `first` to `last` that another piece has had the codes of."""
        made, step = self.made, self.made.inner_block
        band = first
        while band < last:
            if self._keep().known[band]:
                band += 1
                continue
            matrix, inside = divmod(band, made.bands)
            at = (matrix * made.rows + inside * made.how.band_rows) * made.columns // step * step
            with work.passing():
                self._quantize(Span(at, min(at + step, made.inner.size)), work, None)
