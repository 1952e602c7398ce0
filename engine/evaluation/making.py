"""Tensors of a plan, made in memory: those of one layer at a time, for one model or for several that share reads."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from mergemill.engine.plan.memory import make_piece
from mergemill.engine.plan.values import OutputTensor, Piece, Plan
from mergemill.engine.runs.tasks.piece import find_factors, gather_squares, merge_piece, with_factors
from mergemill.engine.runs.worker.modes import own_modes
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.slabs import SLAB, Span, slab_step
from mergemill.engine.tensors.workspace import Workspace, aligned, tensor_of


@dataclass(slots=True)
class LayerRoom:
    """Memory for the tensors of one layer, float32, which those of the next layer or model take over.

    New memory costs the kernel as much as a merge: of eight models, layer after layer, it was 40 % of the time.
    """

    _tensors: list[Tensor] = field(default_factory=list)

    def take(self, place: int, shape: Sequence[int]) -> Tensor:
        """Return memory for the tensor at a place in the layer's list; what was there before is written over."""
        found = self._tensors[place] if place < len(self._tensors) else None
        if found is None or tuple(found.shape) != tuple(shape):
            self._tensors[place:] = [torch.empty(tuple(shape), dtype=torch.float32)]
        return self._tensors[place]


@dataclass(slots=True)
class MadeTensors:
    """The tensors of a plan by name, made when asked for."""

    tensors: Mapping[str, OutputTensor]
    factors: Sequence[float] | None
    """Of all task vectors, where coefficients follow from their norms."""
    workplace: Workplace
    read_bytes: int = 0
    """From the sources so far."""

    def make(self, names: Iterable[str], work: Workspace | None = None) -> dict[str, Tensor]:
        """Return tensors as the merge would write them; of one `work` each source slice is read once."""
        found = {}
        for name in names:
            tensor = self.tensors[name]
            found[name] = torch.empty(tensor.expression.shape, dtype=TORCH_DTYPES[tensor.dtype])
            self._make_one(self._find_piece(name), work, found[name])
        return found

    def make_layer(self, names: Sequence[str], room: LayerRoom, work: Workspace | None) -> dict[str, Tensor]:
        """Return the same tensors as float32, in memory of the room: they last until it is taken again."""
        found = {name: room.take(place, self.tensors[name].expression.shape) for place, name in enumerate(names)}
        for name, tensor in found.items():
            self._make_one(self._find_piece(name), work, tensor)
        return found

    def _find_piece(self, name: str) -> Piece:
        tensor = self.tensors[name]
        return with_factors(make_piece(tensor, Span(0, tensor.expression.size), 0, whole=True), self.factors)

    def _make_one(self, piece: Piece, shared: Workspace | None, result: Tensor) -> None:
        """Write the tensor into `result`, which is of its dtype or float32, slab after slab."""
        values, dtype = result.view(-1), TORCH_DTYPES[piece.tensor.dtype]
        with ExitStack() as stack:
            stack.enter_context(own_modes())
            stack.enter_context(torch.no_grad())
            work = shared or stack.enter_context(self._open(piece.projected.slab_bytes))
            before = work.read_bytes
            for span, merged in merge_piece(piece, {}, work, self.workplace):
                values[span.start : span.stop] = tensor_of(merged).view(dtype)
            work.next_slab()
            self.read_bytes += work.read_bytes - before

    @contextmanager
    def _open(self, size_bytes: int, *, keep: bool = False) -> Iterator[Workspace]:
        place = self.workplace
        with (
            place.lend(size_bytes) as arena,
            Workspace(arena, keep=keep, storage=place.storage, cache=place.cache) as work,
        ):
            yield work

    @contextmanager
    def share(self, others: Sequence["MadeTensors"], names: Sequence[str]) -> Iterator[Workspace | None]:
        """Yield a workspace that keeps what it reads for these tensors of all models; None where it does not fit."""
        need_bytes = count_shared([self, *others], names)
        if need_bytes > self.workplace.share_bytes - self.workplace.lent_bytes:
            yield None
            return
        with self._open(need_bytes, keep=True) as work:
            yield work


def count_shared(models: Sequence[MadeTensors], names: Sequence[str]) -> int:
    """Return an upper bound of what a workspace takes that keeps all that the tensors of all models read."""
    kept: dict[tuple[str, int, int], int] = {}
    slab_bytes = 0
    for made in models:
        for name in names:
            tensor = made.tensors[name]
            piece, span = made._find_piece(name), Span(0, tensor.expression.size)
            slab_bytes = max(slab_bytes, piece.projected.slab_bytes)
            ends = 64 * math.ceil(span.size / slab_step(SLAB, tensor.expression.block))
            for read in (*tensor.expression.reads(span), *tensor.expression.holds(span)):
                kept[read.pin.url, read.offset_bytes, read.size_bytes] = aligned(read.size_bytes) + ends
    return slab_bytes + sum(kept.values())


def open_made(plan: Plan, workplace: Workplace) -> MadeTensors:
    """Return the tensors of a plan; where its coefficients follow from norms, these are gathered now."""
    tensors = {piece.tensor.name: piece.tensor for part in plan.parts for piece in part.pieces}
    made = MadeTensors(tensors, None, workplace)
    if plan.scaling is not None:
        before = workplace.counts.read_bytes
        gather = functools.partial(gather_squares, count=len(plan.scaling.vectors), workplace=workplace)
        total: Partial = functools.reduce(add_partials, map(gather, plan.parts))
        made.factors = find_factors(plan.scaling, total)
        made.read_bytes += workplace.counts.read_bytes - before
    return made
