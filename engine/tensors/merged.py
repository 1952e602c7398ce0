"""Expressions that compute: the difference of two tensors, and a merge method over other expressions."""

import functools
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeGuard

import numpy as np

from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors import native
from mergemill.engine.tensors.device import NO_DOUBLE, device_aligned
from mergemill.engine.tensors.drift import Drift, Watch, make_drifts
from mergemill.engine.tensors.dtypes import TORCH_DTYPES, item_bytes
from mergemill.engine.tensors.exact import ExactSum, count_cuts, sum_products
from mergemill.engine.tensors.expressions import Expression, Leaf, Read, join_blocks
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.kernels import Gather, Kernel, Partial, Rounds, StoredGather, add_partials
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round, join_rounds
from mergemill.engine.tensors.slabs import SLAB, STORED_SLABS, Span, slab_step
from mergemill.engine.tensors.stored import STORED_DTYPES, StoredSlab, merge_alike, merge_slabs, subtract_stored
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, bytes_of, tensor_of

DEVICE_SLABS = 4  # float64 ones that sums, ranks and results take on a device beside what a kernel says


@dataclass(frozen=True, slots=True)
class Difference(Expression):
    """One expression less another: the task vector of a model that has a base of its own."""

    model: Expression
    base: Expression

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """Both."""
        return self.model, self.base

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both."""
        return self.model.shape

    @property
    def dtype(self) -> str:
        """The model's dtype."""
        return self.model.dtype

    @property
    def is_vector(self) -> bool:
        """It is one."""
        return True

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what subtracts slab by slab."""
        return Subtraction(self.dtype, *inputs)

    def describe(self) -> Mapping[str, Any]:
        """Both."""
        return {"difference": [self.model.describe(), self.base.describe()]}


@dataclass(frozen=True, slots=True)
class Subtraction(Plain):
    """The slabs of one tensor less those of another."""

    dtype: str  # of the model
    model: Ready
    less: Ready

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the difference, taken in `dtype`."""
        return self.model.slab(span, work, dtype).sub_(self.less.slab(span, work, dtype))

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the difference, taken in float32."""
        both = self.model.lower(span, work), self.less.lower(span, work)
        return subtract_stored(*both, work.take_bytes(4 * span.size)), "F32"


@dataclass(frozen=True, slots=True)
class Merged(Expression):
    """A merge method over other expressions."""

    kernel: Kernel
    inputs: tuple[Expression, ...]  # the base, where there is one, comes first, and importances last
    has_base: bool
    settings: Mapping[str, Any]  # the method's parameters for this tensor
    place: Place
    dtype: str  # to accumulate in: F32 or F64
    factors: tuple[float, ...] = ()  # on each task vector, before the method; none: all 1
    vectors: tuple[int, ...] = ()  # which of the merge's task vectors each is, where factors follow from their norms
    important: int = 0  # how many of the inputs are importances: none, or one for each model

    @property
    def shape(self) -> tuple[int, ...]:
        """The inputs' common shape."""
        return self.place.shape

    @property
    def block(self) -> int:
        """As the method needs it, and what is inside it."""
        return join_blocks(sorted({*self.iter_blocks()}), self.size)  # few, also where hundreds of experts are inputs

    @property
    def own_block(self) -> int:
        """As the method needs it."""
        return self.place.block

    @property
    def is_merged(self) -> bool:
        """It is."""
        return True

    @property
    def takes_matrices(self) -> bool:
        """Whether the method or an input does."""
        return self.kernel.takes_matrices or any(each.takes_matrices for each in self.inputs)

    def iter_pins(self) -> Iterator[Pin]:
        """The inputs' own."""
        return chain.from_iterable([each.iter_pins() for each in self.inputs])

    def reads_ahead(self, span: Span) -> Iterator[Read]:
        """The inputs' own."""
        return chain.from_iterable([each.reads_ahead(span) for each in self.inputs])

    def find_likeness(self) -> Hashable:
        """The method, its settings, which tensors of one kind have as one value, and the inputs' own."""
        inputs = tuple([each.find_likeness() for each in self.inputs])
        if None in inputs:
            return None
        return (
            id(self.kernel),
            id(self.settings),
            self.has_base,
            self.dtype,
            self.place.shape,
            self.place.block,
            self.important,
            inputs,
        )

    def find_company(self, dtype: str) -> tuple[object, ...] | None:
        """What the slab is of which native loops take several: method, settings, size, block, dtypes, factors."""
        if not self.size or not self._is_stored or not self.makes_natively(dtype):
            return None
        vectors = tuple([(each.dtype, each.is_vector) for each in self.inputs])
        known = self.size, self.place.block, self.has_base, self.factors, vectors, dtype
        return self.kernel, self.settings, *known

    def count_rounds(self) -> tuple[int, int]:
        """The inputs' rounds, which they go through at the same time, and then the method's."""
        usual, most = Expression.count_rounds(self)
        started = self._start()
        if started is None or next(started, None) is None:
            return usual, most
        return usual + self.kernel.usual_rounds, most + self.kernel.most_rounds

    def rounds(self) -> ExpressionRounds:
        """The inputs' rounds, and then the method's."""
        inputs = yield from join_rounds([each.rounds() for each in self.inputs])
        started = self._start()
        statistics = None if started is None else (yield from self._gather(started, inputs))
        fusion = self.kernel.fuse(statistics, self.place, self.settings) if self._suits_native and self.size else None
        return Merging(self, inputs, statistics, fusion and fusion.with_base(self.has_base))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The inputs' slabs, and what kernels and statistics allocate beside them; decoded, or for native loops."""
        inputs = sum(each.slab_bytes(elements, self.dtype) for each in self.inputs)
        slabs = self.kernel.extra_slabs + self.kernel.extra_slabs_each * len(self.inputs)
        beside = slabs * aligned(elements * item_bytes("F64"))
        own = self.kernel.extra_bytes * len(self.inputs) + aligned(elements * item_bytes(dtype))
        decoded = inputs + beside + own
        return max(decoded, self._native_bytes(elements, dtype)) if self.makes_natively(dtype) else decoded

    def step_bytes(self, elements: int, dtype: str) -> int:
        """Of one slab decoded, or of as many as native loops take at once."""
        step = min(slab_step(SLAB, self.block), elements)
        decoded = self.slab_bytes(step, self.dtype) + aligned(step * item_bytes(dtype))
        if not self.makes_natively(dtype):
            return decoded
        return max(decoded, self._native_bytes(min(slab_step(self.steps * SLAB, self.block), elements), dtype))

    def makes_natively(self, dtype: str) -> bool:
        """Whether native loops know the method, and `dtype`, which they make of the inputs."""
        return self.kernel.fuses and dtype in STORED_DTYPES and self._suits_native

    def suits_device(self, device: str) -> bool:
        """Whether the method and its inputs can be worked on there."""
        double = self.dtype != "F32" or self.kernel.needs_double
        there = self.kernel.on_device and not (double and device in NO_DOUBLE)
        return there and all(each.suits_device(device) for each in self.inputs)

    def device_bytes(self, elements: int, dtype: str) -> tuple[int, int]:
        """The inputs, as they are stored and decoded, and the result; and what the method takes beside."""
        ends = sum(1 for _ in self.reads(Span(0, elements))) + len(self.inputs) + 2
        inputs = sum(each.slab_bytes(elements, self.dtype) for each in self.inputs)
        lane_bytes = device_aligned(inputs + elements * item_bytes(dtype)) + 2 * ends * device_aligned(1)
        slabs = self.kernel.extra_slabs + self.kernel.extra_slabs_each * len(self.inputs) + DEVICE_SLABS
        return lane_bytes, slabs * device_aligned(elements * item_bytes("F64"))

    def with_factors(self, factors: Sequence[float]) -> Expression:
        """Return the expression with its share of the factors that all the merge's task vectors have."""
        return replace(self, factors=tuple(factors[vector] for vector in self.vectors))

    def square_rounds(self, count: int) -> Generator[Round, Partial, Partial]:
        """The inputs' rounds, and one for the norms."""
        inputs = yield from join_rounds([each.rounds() for each in self.inputs])
        square = functools.partial(Merging(self, inputs, None, None).gather, functools.partial(self._square, count))
        return (yield Round(square))

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
            **({"importances": self.important} if self.important else {}),
        }

    def _square(self, count: int, tensors: Sequence[Tensor], place: Place) -> Partial:
        squares = [ExactSum() for _ in range(count)]
        for vector, tensor in zip(self.vectors, tensors, strict=True):
            squares[vector] += sum_products(tensor, tensor, place.block)
        return tuple(squares)

    @property
    def takes_less(self) -> bool:
        """Whether the inputs are taken less the base."""
        return self.has_base and self.kernel.takes_deltas

    @property
    def _suits_native(self) -> bool:
        """Whether native loops know what is made of the inputs for the method."""
        known = self.dtype == "F32" and (self.kernel.takes_deltas or not self.has_base)
        return known and native.load() is not None

    @property
    def _is_stored(self) -> bool:
        """Whether native loops take all inputs as they are stored."""
        return all(isinstance(each, Leaf) and each.is_plain for each in self.inputs)

    @property
    def steps(self) -> int:
        """How many slabs native loops take at once; one, where inputs are decoded for them into the core's cache."""
        return STORED_SLABS if all(each.is_lowered for each in self.inputs) else 1

    def make_slab(self, lowered: Iterable[tuple[Arena, str]], span: Span, work: Workspace) -> StoredSlab:
        """Return the slab that native loops take, of that of every input."""
        arrays, dtypes = zip(*lowered, strict=True)
        return StoredSlab(
            arrays=arrays,
            dtypes=dtypes,
            has_base=self.has_base,
            vectors=tuple(each.is_vector for each in self.inputs[self.has_base :]),
            scales=self.factors,
            place=self.place.at(span.start),
            size=span.size,
            work=work,
            owner=id(self),
        )

    def _start(self) -> Rounds | None:
        """Begin the method's statistics; of no elements nothing can be known, nor need be."""
        return self.kernel.start(self.place, self.settings, self.dtype) if self.size else None

    def _gather(self, started: Rounds, inputs: tuple[Ready, ...]) -> Generator[Round, Partial, Any]:
        """Yield the rounds that the method's statistics ask for; return the statistics."""
        try:
            gather = next(started)
            while True:
                gather = started.send((yield self._make_round(gather, inputs)))
        except StopIteration as finished:
            return finished.value

    def _make_round(self, gather: Gather, inputs: tuple[Ready, ...]) -> Round:
        merging = Merging(self, inputs, None, None)
        if not (self._suits_native and isinstance(gather, StoredGather) and gather.knows_stored):
            return Round(functools.partial(merging.gather, gather))
        stored: StoredGather = gather

        def take(span: Span, work: Workspace, total: Partial) -> Partial:
            if work.lanes is not None:
                return merging.gather(gather, span, work, total)
            return stored.add_stored(merging.store(span, work), total)

        return Round(take, self.steps, stored.whole and all(each.is_lowered_whole for each in self.inputs))

    def _native_bytes(self, elements: int, dtype: str) -> int:
        """The inputs as native loops take them, a mask for each, the output, and what statistics hold."""
        stored = sum(each.lowered_bytes(elements) for each in self.inputs)
        masks = (len(self.inputs) + 1) * aligned(elements)
        return stored + masks + aligned(elements * item_bytes(dtype)) + self.kernel.extra_bytes * len(self.inputs)


@dataclass(frozen=True, slots=True)
class Merging:
    """A merge of which the statistics are known: its slabs are combined, or fused from what is stored."""

    merged: Merged
    inputs: tuple[Ready, ...]
    statistics: Any
    fusion: Fusion | None  # how native loops make it; None where they cannot

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the merged slab."""
        if self._is_fused(work, dtype):
            return tensor_of(self._fuse(span, work, dtype, watch)).view(TORCH_DTYPES[dtype])
        return self._combine(span, work, dtype, watch)

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the merged slab as float32."""
        return self.encode(span, work, "F32"), "F32"

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the merged slab's bytes."""
        if self._is_fused(work, dtype):
            return self._fuse(span, work, dtype, watch)
        return bytes_of(self._combine(span, work, dtype, watch))

    def make_watch(self, dtype: str) -> Watch | None:
        """Return what sees how far the merge drifts from its base."""
        return Watch(self.merged.block, deltas=self.merged.takes_less)

    @property
    def base(self) -> Ready:
        """The base model's tensor, or the first input's."""
        return self.inputs[0]

    def step(self, dtype: str) -> int:
        """As many slabs as native loops take."""
        return self.merged.steps if self.fusion is not None and dtype in STORED_DTYPES else 1

    def gather(self, gather: Gather, span: Span, work: Workspace, total: Partial) -> Partial:
        """Return what `gather` takes of the decoded slab, added to `total`."""
        tensors, base = self._load(span, work)
        given = self._scale(tensors)
        if base is not None and getattr(gather, "with_base", False):
            given = [base, *given]
        return add_partials(total, gather(given, self.merged.place.at(span.start)))

    def store(self, span: Span, work: Workspace) -> StoredSlab:
        """Return the slab of every input as native loops take it."""
        return self.merged.make_slab((each.lower(span, work) for each in self.inputs), span, work)

    def _is_fused(self, work: Workspace, dtype: str) -> bool:
        return self.fusion is not None and work.lanes is None and dtype in STORED_DTYPES

    def _fuse(self, span: Span, work: Workspace, dtype: str, watch: Watch | None) -> Arena:
        return fuse_together([self], span, work, dtype, None if watch is None else [watch])

    def _combine(self, span: Span, work: Workspace, dtype: str, watch: Watch | None) -> Tensor:
        merged = self.merged
        tensors, base = self._load(span, work)
        importances = [tensors.pop() for _ in range(merged.important)][::-1] or None
        if watch is not None:
            watch.look(tensors, base)  # as the models are: what large factors make of them is growth
        place = merged.place.at(span.start)
        made = merged.kernel.combine(self._scale(tensors), base, self.statistics, place, merged.settings, importances)
        if watch is not None:
            watch.compare(made)
        if dtype != merged.dtype:
            made = work.take((span.size,), dtype).copy_(made)
        if watch is not None:
            watch.check(made)
        return made

    def _load(self, span: Span, work: Workspace) -> tuple[list[Tensor], Tensor | None]:
        """Return the inputs, less the base where the method takes task vectors, and the base."""
        merged = self.merged
        tensors = [each.slab(span, work, merged.dtype) for each in self.inputs]
        base = tensors.pop(0) if merged.has_base else None
        if base is not None and merged.kernel.takes_deltas:
            for source, tensor in zip(merged.inputs[1:], tensors, strict=True):
                if not source.is_vector:
                    tensor.sub_(base)
        return tensors, base

    def _scale(self, tensors: list[Tensor]) -> list[Tensor]:
        for tensor, factor in zip(tensors, self.merged.factors, strict=bool(self.merged.factors)):
            if factor != 1.0:
                tensor.mul_(factor)
        return tensors


def merge_company(
    company: Sequence[Expression], span: Span, work: Workspace, dtype: str
) -> tuple[Arena, list[Drift]] | None:
    """Return the bytes of whole tensors of one company, one after the other, and how far each drifts from its base.

    None where more must be known of each than the settings say: then they have rounds.
    """
    first = company[0]
    assert isinstance(first, Merged), "only merges have company"
    fusion = first.kernel.fuse_whole(span.size, first.settings)
    if fusion is None or fusion.is_alone or fusion.is_keyed:
        return None
    lowered = [[each.lower(span, work) for each in merge.inputs if isinstance(each, Leaf)] for merge in company]
    squares = np.empty((len(company), len(first.inputs) + 1, count_cuts(span.size, first.block)))
    slab, arrays = first.make_slab(lowered[0], span, work), [[array for array, _ in of_one] for of_one in lowered]
    encoded, broken = merge_alike(slab, arrays, fusion.with_base(first.has_base), dtype, squares)
    return encoded, make_drifts(squares, broken)


def are_fused_together(merges: Sequence[Ready]) -> TypeGuard[Sequence[Merging]]:
    """Whether `fuse_together` knows all of these, which are of one company (`Merged.find_company`)."""
    return all(isinstance(each, Merging) and each.fusion is not None and not each.fusion.is_alone for each in merges)


def fuse_together(
    merges: Sequence[Merging], span: Span, work: Workspace, dtype: str, watches: Sequence[Watch] | None
) -> Arena:
    """Return the bytes of one span of several tensors, one after the other, merged by native loops in one call."""
    fusions = [each.fusion for each in merges if each.fusion is not None]
    slabs = [each.store(span, work) for each in merges]
    squares = None
    if watches is not None:
        own = watches[0].make_squares(span.size, len(merges[0].inputs) + 1)
        squares = own[None] if len(merges) == 1 else np.empty((len(merges), *own.shape))
    encoded, broken = merge_slabs(slabs, fusions, dtype, squares)
    if watches is not None and squares is not None:
        for watch, seen, count in zip(watches, squares, broken, strict=True):
            watch.record(seen, count)
    return encoded
