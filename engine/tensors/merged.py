"""Expressions that compute: the difference of two tensors, and a merge method over other expressions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergemill.engine.tensors import native
from mergemill.engine.tensors.device import NO_DOUBLE, device_aligned
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.exact import ExactSum, sum_products
from mergemill.engine.tensors.expressions import Expression, Read, Stored
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import (
    Gather,
    Kernel,
    Partial,
    StoredGather,
    add_partials,
    advance,
    find_statistics,
)
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.stored import STORED_DTYPES, StoredSlab
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned

DEVICE_SLABS = 4  # float64 ones that sums, ranks and results take on a device beside what a kernel says


@dataclass(frozen=True, slots=True)
class Difference:
    """One expression less another: the task vector of a model that has a base of its own."""

    model: Expression
    base: Expression

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both."""
        return self.model.shape

    @property
    def dtype(self) -> str:
        """The model's dtype."""
        return self.model.dtype

    @property
    def block(self) -> int:
        """What suits both."""
        return max(self.model.block, self.base.block)

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's ranges in both."""
        yield from self.model.reads(span)
        yield from self.base.reads(span)

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return the difference, taken in `dtype`."""
        return self.model.evaluate(span, work, dtype).sub_(self.base.evaluate(span, work, dtype))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Both, decoded."""
        return self.model.slab_bytes(elements, dtype) + self.base.slab_bytes(elements, dtype)

    def describe(self) -> Mapping[str, Any]:
        """Both."""
        return {"difference": [self.model.describe(), self.base.describe()]}


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge method over other expressions."""

    kernel: Kernel
    inputs: tuple[Expression, ...]  # the base, where there is one, comes first
    has_base: bool
    settings: Mapping[str, Any]  # the method's parameters for this tensor
    place: Place
    dtype: str  # to accumulate in: F32 or F64
    factors: tuple[float, ...] = ()  # on each task vector, before the method; none: all 1
    vectors: tuple[int, ...] = ()  # which of the merge's task vectors each is, where factors follow from their norms

    @property
    def shape(self) -> tuple[int, ...]:
        """The inputs' common shape."""
        return self.place.shape

    @property
    def block(self) -> int:
        """As the method needs it."""
        return self.place.block

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's ranges in every input."""
        for source in self.inputs:
            yield from source.reads(span)

    def advance(self, totals: Sequence[Partial]) -> tuple[Gather | None, Any]:
        """Return what the next round gathers from each slab; None and the statistics when all is known."""
        if not self.place.size:
            return None, None  # of no elements nothing can be known, nor need be
        return advance(self.kernel, self.place, self.settings, self.dtype, totals)

    def find_statistics(self, totals: Sequence[Partial], gather: Callable[[Gather], Partial]) -> Any:
        """Return the statistics; what the rounds after `totals` ask for, `gather` gathers from the whole tensor."""
        if not self.place.size:
            return None
        return find_statistics(self.kernel, self.place, self.settings, self.dtype, totals, gather)

    def rounds(self) -> int:
        """How many rounds of statistics must precede the combination, at most."""
        return 0 if self.advance(())[0] is None else self.kernel.most_rounds

    def gather(self, gather: Gather, span: Span, work: Workspace, total: Partial = ()) -> Partial:
        """Return what one round gathers from one slab, added to `total`, which may be overwritten."""
        if work.lanes is None and isinstance(gather, StoredGather) and self.gathers_stored(gather):
            return gather.add_stored(self._store(span, work), total)
        return add_partials(total, gather(self._load_tensors(span, work), self.place.at(span.start)))

    def gathers_stored(self, gather: Gather) -> bool:
        """Whether `gather` works on slabs as they are stored."""
        return isinstance(gather, StoredGather) and gather.knows_stored and self._is_plain()

    def takes_whole(self, gather: Gather) -> bool:
        """Whether `gather` takes a tensor that is held as one slab."""
        return isinstance(gather, StoredGather) and gather.whole and self.gathers_stored(gather)

    def hold(self, work: Workspace) -> None:
        """Have each input read into one piece of memory."""
        for source in self.inputs:
            if isinstance(source, Stored):
                (whole,) = source.reads(Span(0, self.place.size))
                work.hold(whole.pin, whole.offset_bytes, whole.size_bytes)

    def is_native(self, dtype: str) -> bool:
        """Whether native loops know the method, the inputs and `dtype`, which they make of them."""
        return self.kernel.fuses and dtype in STORED_DTYPES and self._is_plain()

    def fuse(self, statistics: Any, dtype: str) -> Fusion | None:
        """Return how native loops make the tensor as `dtype` from what is stored; None where they cannot."""
        if not self.is_native(dtype) or not self.place.size:
            return None
        return self.kernel.fuse(statistics, self.place, self.settings)

    def merge_stored(self, fusion: Fusion, span: Span, work: Workspace, dtype: str, watch: Watch | None) -> Arena:
        """Return the merged slab as `dtype`, as bytes; `watch` sees it and its inputs."""
        squares = None if watch is None else watch.make_squares(span.size, len(self.inputs) + 1)
        merged, broken = self._store(span, work).merge(fusion, dtype, squares)
        if watch is not None and squares is not None:
            watch.record(squares, broken)
        return merged

    def combine(self, statistics: Any, span: Span, work: Workspace, watch: Watch | None = None) -> Tensor:
        """Return the merged slab, flat, in the dtype of the accumulation; `watch` sees it and its inputs."""
        tensors, base = self._load_all(span, work, watch)
        merged = self.kernel.combine(tensors, base, statistics, self.place.at(span.start), self.settings)
        if watch is not None:
            watch.compare(merged)
        return merged

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return the merged slab of a method that needs no statistics, as `dtype`."""
        result = self.combine(None, span, work)
        return result if dtype == self.dtype else work.take((span.size,), dtype).copy_(result)

    def with_factors(self, factors: Sequence[float]) -> "Merged":
        """Return the expression with its share of the factors that all the merge's task vectors have."""
        return replace(self, factors=tuple(factors[vector] for vector in self.vectors))

    def gather_squares(self, count: int, span: Span, work: Workspace) -> Partial:
        """Return the slab's share of the squared norms of the merge's `count` task vectors."""
        tensors = self._load_tensors(span, work)
        squares = [ExactSum() for _ in range(count)]
        for vector, tensor in zip(self.vectors, tensors, strict=True):
            squares[vector] += sum_products(tensor, tensor, self.place.block)
        return tuple(squares)

    def _load_tensors(self, span: Span, work: Workspace) -> list[Tensor]:
        """Return what a round gathers from: the inputs without the base."""
        return self._scale(self._load(span, work)[0])

    def _load_all(self, span: Span, work: Workspace, watch: Watch | None) -> tuple[list[Tensor], Tensor | None]:
        """Return what the kernel combines: the inputs and the base."""
        tensors, base = self._load(span, work)
        if watch is not None:
            watch.look(tensors, base)  # as the models are: what large factors make of them is growth
        return self._scale(tensors), base

    def _load(self, span: Span, work: Workspace) -> tuple[list[Tensor], Tensor | None]:
        tensors = [source.evaluate(span, work, self.dtype) for source in self.inputs]
        base = tensors.pop(0) if self.has_base else None
        if base is not None and self.kernel.takes_deltas:
            for source, tensor in zip(self.inputs[1:], tensors, strict=True):
                if not isinstance(source, Difference):
                    tensor.sub_(base)
        return tensors, base

    def _store(self, span: Span, work: Workspace) -> StoredSlab:
        """Return the slab of every input as it is stored."""
        stored = [source for source in self.inputs if isinstance(source, Stored)]
        return StoredSlab(
            arrays=tuple(source.read_array(span, work) for source in stored),
            dtypes=tuple(source.dtype for source in stored),
            has_base=self.has_base,
            scales=self.factors,
            place=self.place.at(span.start),
            size=span.size,
            work=work,
        )

    def _is_plain(self) -> bool:
        """Whether native loops can work on the inputs as they are stored."""
        return (
            self.dtype == "F32"
            and (self.kernel.takes_deltas or not self.has_base)
            and all(isinstance(source, Stored) and source.dtype in STORED_DTYPES for source in self.inputs)
            and native.load() is not None
        )

    def _scale(self, tensors: list[Tensor]) -> list[Tensor]:
        for tensor, factor in zip(tensors, self.factors, strict=bool(self.factors)):
            if factor != 1.0:
                tensor.mul_(factor)
        return tensors

    def suits_device(self, device: str) -> bool:
        """Whether the method and its inputs can be worked on there: what is not float32 needs a device for it."""
        narrow = device in NO_DOUBLE
        sources = [leaf for source in self.inputs for leaf in _iterate_parts(source)]
        nested = all(source.suits_device(device) for source in sources if isinstance(source, Merged))
        if not self.kernel.on_device or not nested:
            return False
        plain = self.dtype == "F32" and not self.kernel.needs_double
        return not narrow or (plain and all(source.dtype in STORED_DTYPES for source in sources))

    def device_bytes(self, elements: int, dtype: str) -> tuple[int, int]:
        """An upper bound of what a slab takes of a device: of a lane, and beside it."""
        ends = sum(1 for _ in self.reads(Span(0, elements))) + len(self.inputs) + 2
        inputs = sum(source.slab_bytes(elements, self.dtype) for source in self.inputs)
        lane_bytes = device_aligned(inputs + elements * item_bytes(dtype)) + 2 * ends * device_aligned(1)
        slabs = self.kernel.extra_slabs + self.kernel.extra_slabs_each * len(self.inputs) + DEVICE_SLABS
        return lane_bytes, slabs * device_aligned(elements * item_bytes("F64"))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The inputs' slabs, and what kernels and statistics allocate beside them."""
        inputs = sum(source.slab_bytes(elements, self.dtype) for source in self.inputs)
        slabs = self.kernel.extra_slabs + self.kernel.extra_slabs_each * len(self.inputs)
        beside = slabs * aligned(elements * item_bytes("F64"))
        return inputs + beside + self.kernel.extra_bytes * len(self.inputs) + aligned(elements * item_bytes(dtype))

    def stored_slab_bytes(self, elements: int, dtype: str) -> int:
        """The inputs as they are stored, a mask for each, the output, and what statistics hold; for native loops."""
        stored = sum(aligned(elements * item_bytes(source.dtype)) for source in self.inputs)
        masks = (len(self.inputs) + 1) * aligned(elements)
        return stored + masks + aligned(elements * item_bytes(dtype)) + self.kernel.extra_bytes * len(self.inputs)

    def describe(self) -> Mapping[str, Any]:
        """The method, its settings, where its random numbers come from, and its inputs."""
        return {
            "merged": self.kernel.name,
            "settings": dict(self.settings),
            "seed": [self.place.seed, self.place.tensor, *self.place.models],
            "base": self.has_base,
            "dtype": self.dtype,
            "inputs": [source.describe() for source in self.inputs],
            **({"factors": list(self.factors)} if self.factors else {}),
            **({"vectors": list(self.vectors)} if self.vectors else {}),
        }


def _iterate_parts(source: Expression) -> Iterator[Expression]:
    if isinstance(source, Difference):
        yield from _iterate_parts(source.model)
        yield from _iterate_parts(source.base)
    else:
        yield source
