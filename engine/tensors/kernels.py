"""What an expression asks of a merge method, and what a method's statistics are.

Statistics are a generator: it yields a function that gathers something additive from each slab, is sent the total
over the whole tensor, and so on, until it returns what the kernel needs. Given the totals of the rounds so far, any
process can replay it, so a round may run on one worker and the next on another.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mergemill.engine.tensors.exact import ExactSum, Extremes
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import StoredSlab

# What a round gathers; partial results of slabs are added, component by component, exactly.
Partial = tuple[Any, ...]
# One that is a `StoredGather` can do without the tensors; one whose `with_base` is true is given the base before them.
Gather = Callable[[Sequence[Tensor], Place], Partial]
Rounds = Generator[Gather, Partial, Any]


class Additive:
    """A partial result of its own kind."""

    def __add__(self, other: Any) -> Any:
        """Return both as one; the order plays no part in what is made of it."""
        raise NotImplementedError


class StoredGather:
    """What a round gathers, done as well by native loops over slabs as they are stored, with the same result."""

    @property
    def whole(self) -> bool:
        """Whether they take a tensor that lies in one piece as one slab: what they make of a slab is little."""
        return False

    @property
    def knows_stored(self) -> bool:
        """Whether the loops can do it."""
        return True

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """Return the total of the slabs before, which may be empty and is overwritten, and of this one."""
        raise NotImplementedError


class Kernel(Protocol):
    """A merge method, as the expressions see it."""

    @property
    def name(self) -> str:
        """The method's name in a recipe."""

    @property
    def takes_deltas(self) -> bool:
        """Whether it is given differences to the base instead of the models."""

    @property
    def usual_rounds(self) -> int:
        """How many rounds of statistics it asks for with nearly every tensor, if it asks for any."""

    @property
    def most_rounds(self) -> int:
        """How many it may ask for."""

    @property
    def extra_slabs(self) -> int:
        """How many float64 slabs it may allocate at once beside its inputs."""

    @property
    def extra_slabs_each(self) -> int:
        """How many more for each of its inputs."""

    @property
    def extra_bytes(self) -> int:
        """What its statistics may hold, for each input, whatever the slab."""

    @property
    def on_device(self) -> bool:
        """Whether it works on tensors that lie on a device."""

    @property
    def takes_matrices(self) -> bool:
        """Whether it decomposes or multiplies whole matrices."""

    @property
    def needs_double(self) -> bool:
        """Whether it makes float64 of float32."""

    @property
    def fuses(self) -> bool:
        """Whether `fuse` knows the method, but for odd values."""

    def block(self, shape: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """Elements at whose multiples a tensor of `shape` may be cut into slabs."""

    def start(self, place: Place, settings: Mapping[str, Any], dtype: str) -> Rounds | None:
        """Begin its statistics; None where it has none."""

    def fuse(self, statistics: Any, place: Place, settings: Mapping[str, Any]) -> Fusion | None:
        """Return how native loops make a slab from what is stored; None where they cannot."""

    def fuse_whole(self, size: int, settings: Mapping[str, Any]) -> Fusion | None:
        """Return how they make a slab that is a whole tensor of so many elements, any, without a round before."""

    def combine(
        self,
        tensors: list[Tensor],
        base: Tensor | None,
        statistics: Any,
        place: Place,
        settings: Mapping[str, Any],
        importances: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the merged slab; `tensors`, `base` and `importances` may be overwritten."""


def add_partials(left: Partial, right: Partial) -> Partial:
    """Return the component-wise sum; an empty partial is zero."""
    if not left or not right:
        return left or right
    return tuple(_add(a, b) for a, b in zip(left, right, strict=True))


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, tuple):
        return add_partials(left, right)
    if isinstance(left, Additive | ExactSum | Extremes | int | np.ndarray):
        return left + right
    raise TypeError(
        f"a partial result holds a {type(left).__name__}; give integers, arrays of them, ExactSum, Extremes or tuples"
    )
