"""The rounds of an expression: passes over the whole of it that gather what must be known before a slab can be made.

An expression's rounds are a generator: it yields a `Round`, is sent the total over the whole tensor, and so on, until
it returns a `Ready` thing, which gives slabs. Given the totals of the rounds so far, any process can replay it, so a
round may run on one worker and the next on another. What stands inside another expression has its rounds first.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.workspace import Arena, Workspace, bytes_of

T = TypeVar("T")
Take = Callable[[Span, Workspace, Partial], Partial]


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the whole of a tensor."""

    take: Take  # what it gathers from one slab, added to the total so far, which may be overwritten
    slabs: int = 1  # how many slabs it takes at once, where the CPU merges
    whole: bool = False  # whether it takes all of them at once where the inputs are held in one piece


class Ready(Protocol):
    """A tensor of which all is known that must be known first."""

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements, flat, as `dtype`, in memory that the caller may overwrite.

        They lie on the workspace's device, if it has one. `watch` sees them, and what they are made of.
        """

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the span as native loops take it: its bytes, not to be changed, and their dtype."""

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes as they are written: of `dtype`, on the host; `watch` as for `slab`."""

    def make_watch(self, dtype: str) -> Watch | None:
        """Return what sees how far a merge drifts from its base, or what a cast to `dtype` breaks; None for a copy."""

    @property
    def base(self) -> "Ready":
        """What is written instead, where the base is kept."""

    def step(self, dtype: str) -> int:
        """Return how many slabs at once are best encoded as `dtype`."""


class Plain:
    """What is ready and no merge: its slabs are copied, or cast."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def dtype(self) -> str:
            """Its own."""

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements, flat, as `dtype`, in memory that the caller may overwrite."""
        raise NotImplementedError

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the span as native loops take it: as float32."""
        return bytes_of(self.slab(span, work, "F32")), "F32"

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes as `dtype`; `watch` sees what a cast breaks."""
        cast = self.slab(span, work, dtype)
        if watch is not None:
            watch.check(cast)
        return bytes_of(cast)

    def make_watch(self, dtype: str) -> Watch | None:
        """Return what counts the values that a cast breaks."""
        return Watch(BLOCK, deltas=False) if dtype != self.dtype else None

    @property
    def base(self) -> Ready:
        """Itself."""
        return self

    def step(self, dtype: str) -> int:
        """One slab at a time."""
        return 1


ExpressionRounds = Generator[Round, Partial, Ready]


def find_round(rounds: Generator[Round, Partial, Any], totals: Iterable[Partial]) -> Round | None:
    """Return the round after those of `totals`; None where none is left."""
    try:
        asked = next(rounds)
        for total in totals:
            asked = rounds.send(total)
    except StopIteration:
        return None
    return asked


def finish_rounds(
    rounds: Generator[Round, Partial, T], totals: Iterable[Partial], gather: Callable[[Round], Partial]
) -> T:
    """Go through the rounds to the end; those after `totals`, `gather` gathers from the whole tensor."""
    known = iter(totals)
    try:
        asked = next(rounds)
        while True:
            total = next(known, None)
            asked = rounds.send(gather(asked) if total is None else total)
    except StopIteration as finished:
        found: T = finished.value
        return found


def join_rounds(several: Sequence[ExpressionRounds]) -> Generator[Round, Partial, tuple[Ready, ...]]:
    """Go through the rounds of several expressions at the same time, each pass for all that still need one."""
    going = dict(enumerate(several))
    totals: Partial = (None,) * len(several)
    ready: list[Any] = [None] * len(several)
    while True:
        asked: dict[int, Round] = {}
        for i, rounds in list(going.items()):
            try:
                asked[i] = rounds.send(totals[i])
            except StopIteration as finished:
                ready[i] = finished.value
                del going[i]
        if not asked:
            return tuple(ready)
        totals = yield _join(asked, len(several))


def _join(asked: dict[int, Round], count: int) -> Round:
    def take(span: Span, work: Workspace, total: Partial) -> Partial:
        found = list(total or ((),) * count)
        for i, each in asked.items():
            found[i] = each.take(span, work, found[i])
        return tuple(found)

    return Round(take, min(each.slabs for each in asked.values()), all(each.whole for each in asked.values()))
