"""Lazy tensor expressions: what an output tensor is made of, known from headers alone.

An expression is a frozen value that pickles in a few hundred bytes; none but `Held` ever holds a tensor. It knows its
`shape` and `dtype`, what it reads for a span of its elements, and what every span needs whole. What must be known of
the whole tensor first it asks for in rounds (`rounds.py`), and becomes a `Ready` thing that gives slabs.
"""

import functools
import math
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergemill.engine.errors import MergeError
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.device import NO_DOUBLE
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import NAMES, item_bytes
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round, join_rounds
from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span, slab_step
from mergemill.engine.tensors.stored import STORED_DTYPES
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, bytes_of, tensor_of


class Read(NamedTuple):
    """One contiguous range of one stored file."""

    pin: Pin
    offset_bytes: int
    size_bytes: int


class Expression:
    """A tensor that can be had, span by span, once its rounds are over.

    What is not said otherwise follows from the `inputs`; a kind says at least its `shape`, `dtype` and `inputs`, what
    `describe` returns, and what it becomes when its inputs are ready.
    """

    __slots__ = ()

    if TYPE_CHECKING:  # where they are fields, a property here would be taken for their default

        @property
        def shape(self) -> tuple[int, ...]:
            """The whole tensor's shape."""

        @property
        def dtype(self) -> str:
            """The dtype that the expression has by itself, by its safetensors name."""

        @property
        def inputs(self) -> "tuple[Expression, ...]":
            """The expressions that it is made of."""

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def block(self) -> int:
        """Elements at whose multiples it may be cut into spans."""
        return join_blocks([each.block for each in self.inputs], self.size)

    @property
    def own_block(self) -> int:
        """Elements that cannot be had apart, whatever its inputs are; 1: each can."""
        return 1

    def iter_blocks(self) -> Iterator[int]:
        """Yield its block and those of all that it is made of, as far as its own spans are spans of them."""
        # A leaf may be cut anywhere, and a stack of experts has hundreds of them.
        inner = [each.iter_blocks() for each in self.inputs if not isinstance(each, Leaf)]
        return chain((self.own_block,), *inner)

    @property
    def grain(self) -> int:
        """Elements at whose multiples it is best cut into pieces: of what lies between, each piece reads the whole."""
        return math.lcm(*(each.grain for each in self.inputs))

    @property
    def is_merged(self) -> bool:
        """Whether a method makes it, and not a copy of what is stored; the guard looks at what is."""
        return False

    @property
    def is_watched(self) -> bool:
        """Whether the guard counts what is not finite in it, also where it is not cast."""
        return self.is_merged

    @property
    def is_vector(self) -> bool:
        """Whether it is a task vector already, from which no base is to be taken."""
        return False

    @property
    def is_plain(self) -> bool:
        """Whether native loops take its bytes as they are stored, without a copy."""
        return False

    @property
    def is_lowered(self) -> bool:
        """Whether native loops take its bytes, whatever these are, and nothing is decoded for them to memory."""
        return self.is_plain

    @property
    def is_lowered_whole(self) -> bool:
        """Whether what native loops are given takes no more for all of it than for a slab, beside what is read."""
        return self.is_plain

    def lowered_bytes(self, elements: int) -> int:
        """What native loops are given for a slab takes."""
        plain = self.is_plain
        return aligned(elements * item_bytes(self.dtype)) if plain else self.slab_bytes(elements, "F32")

    @property
    def takes_matrices(self) -> bool:
        """Whether whole matrices are decomposed or multiplied for it."""
        return any(each.takes_matrices for each in self.inputs)

    def count_rounds(self) -> tuple[int, int]:
        """Return how many rounds it takes for nearly every tensor, and how many it may take."""
        counts = [each.count_rounds() for each in self.inputs] or [(0, 0)]
        return max(usual for usual, _ in counts), max(most for _, most in counts)

    @property
    def made_with(self) -> object:
        """What tensors that are best written by one task have in common; None: it has no such."""
        return None

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what a slab of `span` reads; for a part of the span, parts of these ranges."""
        return chain.from_iterable([each.reads(span) for each in self.inputs])

    def reads_ahead(self, span: Span) -> Iterator[Read]:
        """Yield of this what a disk is best asked for before a slab is there that needs it."""
        return self.reads(span)

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what slabs of the span need whole, read once for each task: scales, an index, an adapter's factor."""
        return chain.from_iterable([each.holds(span) for each in self.inputs])

    def iter_pins(self) -> Iterator[Pin]:
        """Yield the files of what it reads, without what is held beside."""
        for each in self.reads(Span(0, 0)):
            yield each.pin

    def rounds(self) -> ExpressionRounds:
        """Yield the rounds, be sent the total of each, and return what then gives slabs."""
        inputs = yield from join_rounds([each.rounds() for each in self.inputs])
        return self.get_ready(inputs)

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what gives slabs, once the `inputs` do."""
        raise NotImplementedError

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """An upper bound of what a slab as `dtype` takes, of the workspace and beside it; without `holds`."""
        return sum(each.slab_bytes(elements, dtype) for each in self.inputs)

    def step_bytes(self, elements: int, dtype: str) -> int:
        """The same for the largest slab that a pass over so many elements takes, with its encoded bytes."""
        step = min(slab_step(SLAB, self.block), elements)
        return self.slab_bytes(step, dtype) + aligned(step * item_bytes(dtype))

    def makes_natively(self, dtype: str) -> bool:
        """Whether native loops make it as `dtype` of what is stored."""
        return not self.is_merged

    def suits_device(self, device: str) -> bool:
        """Whether it can be worked on there: what is not float32 needs a device for it."""
        return all(each.suits_device(device) for each in self.inputs)

    def device_bytes(self, elements: int, dtype: str) -> tuple[int, int]:
        """An upper bound of what a slab takes of a device: of a lane, and beside it."""
        return 0, 0

    def with_factors(self, factors: Sequence[float]) -> "Expression":
        """Return it with its share of the factors that all task vectors of a merge have."""
        return self

    def square_rounds(self, count: int) -> Generator[Round, Partial, Partial]:
        """Yield rounds for the squared norms of those of the merge's `count` task vectors that it has; return these."""
        yield from ()
        return ()

    def find_likeness(self) -> Hashable:
        """Return what is equal for expressions that take the same memory and rounds; None where nothing says so."""
        return None

    def find_company(self, dtype: str) -> tuple[object, ...] | None:
        """Return what is equal for tensors that native loops make as `dtype` in one call; None: it is made alone."""
        return None

    def find_read(self, span: Span, dtype: str) -> Read | None:
        """Return the one range where the span's bytes lie as they are written; None where they do not."""
        return None

    def describe(self) -> Mapping[str, Any]:
        """Return what the expression's value depends on, as JSON: it goes into the plan's digest."""
        raise NotImplementedError


class Leaf(Plain, Expression):
    """A tensor that is there: it gives its slabs itself."""

    __slots__ = ()

    inputs = ()

    @property
    def block(self) -> int:
        """Any will do."""
        return BLOCK

    def holds(self, span: Span) -> Iterator[Read]:
        """Nothing."""
        return iter(())

    def rounds(self) -> ExpressionRounds:
        """None."""
        yield from ()
        return self

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """It is."""
        return self

    def suits_device(self, device: str) -> bool:
        """Any device knows float32 and what it is decoded from."""
        return device not in NO_DOUBLE or self.dtype in STORED_DTYPES

    def read(self, span: Span, work: Workspace) -> Arena:
        """Return the span's bytes, not to be changed."""
        raise NotImplementedError

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the span as it is, where native loops know the dtype, else as float32."""
        return (self.read(span, work), self.dtype) if self.is_plain else Plain.lower(self, span, work)

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes as `dtype`: as they are, or cast."""
        return self.read(span, work) if dtype == self.dtype else Plain.encode(self, span, work, dtype, watch)


@dataclass(frozen=True, slots=True)
class Stored(Leaf):
    """A tensor as it lies in a safetensors file."""

    pin: Pin
    offset_bytes: int  # of the first element, from the start of the file
    dtype: str
    shape: tuple[int, ...]
    read_from: Pin | None = None  # a file with the same content that is read instead

    @property
    def is_plain(self) -> bool:
        """Where native loops know its dtype."""
        return self.dtype in STORED_DTYPES

    def find_likeness(self) -> Hashable:
        """Its dtype and shape."""
        return self.dtype, self.shape

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's one range."""
        return iter((self.find_range(span),))

    def find_range(self, span: Span) -> Read:
        """Return the span's range."""
        item = item_bytes(self.dtype)
        return Read(self.read_from or self.pin, self.offset_bytes + span.start * item, span.size * item)

    def iter_pins(self) -> Iterator[Pin]:
        """Its one file."""
        return iter((self.read_from or self.pin,))

    def find_read(self, span: Span, dtype: str) -> Read | None:
        """Return the span's range, where its dtype is that of the output."""
        return self.find_range(span) if dtype == self.dtype else None

    def read(self, span: Span, work: Workspace) -> Arena:
        """Return the span's bytes, not to be changed."""
        return work.read_array(*self.find_range(span))

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span decoded to `dtype`."""
        raw = work.read(*self.find_range(span))
        return work.decode(raw, self.dtype, dtype)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Bytes as stored and bytes decoded."""
        return aligned(elements * item_bytes(self.dtype)) + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The file as pinned, and the place in it."""
        pin = [self.pin.url, self.pin.size_bytes, self.pin.stamp]
        return {"stored": pin, "at": self.offset_bytes, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True, eq=False)
class Held(Leaf):
    """A tensor in this process's memory, on any device and with any strides; copied span by span, never changed."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """The tensor's dtype."""
        return NAMES[self.tensor.dtype]

    def reads(self, span: Span) -> Iterator[Read]:
        """Nothing is read from storage."""
        return iter(())

    def read(self, span: Span, work: Workspace) -> Arena:
        """Return the span's bytes, not to be changed."""
        return bytes_of(self._slice(span).cpu())

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return a copy of the span as `dtype`."""
        return work.take((span.size,), dtype).copy_(self._slice(span))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The copy; the tensor itself is there already."""
        return aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """Its kind alone: a tensor in memory goes into no digest."""
        return {"held": list(self.shape), "dtype": self.dtype}

    def _slice(self, span: Span) -> Tensor:
        tensor = self.tensor.detach()
        if tensor.is_contiguous():
            return tensor.view(-1)[span.start : span.stop]
        tensor = tensor.squeeze()  # then no more is copied than the entries of the first axis that the span touches
        entry = tensor[0].numel()
        first = span.start // entry
        flat = tensor[first : -(-span.stop // entry)].reshape(-1)
        return flat[span.start - first * entry : span.stop - first * entry]


@dataclass(frozen=True, slots=True)
class Agreed(Expression):
    """A buffer that arithmetic does not suit: the same bytes in every input, or an error."""

    tensor: str  # name in the output
    inputs: tuple[Expression, ...]
    models: tuple[str, ...]  # the inputs' models, for the error

    @property
    def shape(self) -> tuple[int, ...]:
        """The inputs' common shape."""
        return self.inputs[0].shape

    @property
    def dtype(self) -> str:
        """The inputs' common dtype."""
        return self.inputs[0].dtype

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what compares the inputs' slabs."""
        return Agreement(self, inputs)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Every input as it is, and one decoded."""
        raw = sum(each.slab_bytes(elements, self.dtype) for each in self.inputs)
        return raw + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The inputs."""
        return {"agreed": [each.describe() for each in self.inputs]}


@dataclass(frozen=True, slots=True)
class Agreement(Plain):
    """A buffer of which every slab is compared."""

    agreed: Agreed
    inputs: tuple[Ready, ...]

    @property
    def dtype(self) -> str:
        """The inputs' common dtype."""
        return self.agreed.dtype

    def read(self, span: Span, work: Workspace) -> Arena:
        """Return the bytes on which all inputs agree; `MergeError` names two that do not."""
        agreed = self.agreed
        first, *others = (each.encode(span, work, agreed.dtype) for each in self.inputs)
        for other, model in zip(others, agreed.models[1:], strict=True):
            if not np.array_equal(first, other):
                raise MergeError(
                    f"{agreed.tensor}: {agreed.models[0]} and {model} hold different values, and {agreed.dtype} "
                    f"tensors are not merged but copied where all models agree"
                )
        return first

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's common elements as `dtype`."""
        return work.decode(tensor_of(self.read(span, work)), self.dtype, dtype)

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's common bytes as `dtype`."""
        return self.read(span, work) if dtype == self.dtype else Plain.encode(self, span, work, dtype, watch)


def join_blocks(blocks: Sequence[int], size: int) -> int:
    """Return the elements at whose multiples all of `blocks` begin: the largest, or the whole where it is of no use.

    >>> join_blocks([4, 12, 4], 100), join_blocks([4, 6], 100), join_blocks([100, 64], 100)
    (12, 100, 100)
    """
    return _join_blocks(tuple(blocks), size)


@functools.lru_cache(maxsize=1024)  # the tensors of a mixture's experts are alike
def _join_blocks(blocks: tuple[int, ...], size: int) -> int:
    largest = max(blocks, default=BLOCK)
    fits = largest >= size or all(largest % block == 0 for block in blocks)
    return largest if fits else max(1, size)


def input_bytes(expression: Expression) -> int:
    """Return how many bytes of the sources one pass over the whole expression reads."""
    return sum(read.size_bytes for read in expression.reads(Span(0, expression.size)))
