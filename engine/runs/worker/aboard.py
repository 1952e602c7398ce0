"""A piece's slabs by way of a device: put in, merged, encoded and taken out, one slab ahead of the one that is written.

While the bytes of one slab are checksummed and written, the next is read, copied in and worked on.
"""

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from mergemill.engine.errors import RunError
from mergemill.engine.plan.memory import find_staging
from mergemill.engine.plan.values import Piece
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.tensors.device import Lanes, Staging
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.rounds import Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Arena, Results, Workspace


def find_device_staging(piece: Piece, workplace: Workplace, slab: int) -> Staging | None:
    """Return how the piece goes by way of the workplace's device; None where it is the CPU's."""
    if workplace.device is None:
        return None
    device = workplace.device
    return find_staging(piece, device.kind, slab, workplace.share_bytes, device.share_bytes)


@contextmanager
def open_work(
    piece: Piece,
    arena: Arena,
    workplace: Workplace,
    staging: Staging | None,
    *,
    keep: bool = False,
    results: Results | None = None,
) -> Iterator[Workspace]:
    """Yield the workspace of one piece; with a `staging`, its slabs lie on the workplace's device.

    results: of the part's other pieces.

    Raises `RunError` where the device has not the memory that it was promised to have.
    """
    with ExitStack() as stack:
        # The device's memory is no variable here: an error that goes by holds all of them for as long as it is there.
        yield stack.enter_context(
            Workspace(
                arena,
                keep=keep,
                storage=workplace.storage,
                cache=workplace.cache,
                lanes=_take_lanes(piece, workplace, staging, stack),
                results=results,
                lasting=workplace.lasting,
            )
        )


def _take_lanes(piece: Piece, workplace: Workplace, staging: Staging | None, stack: ExitStack) -> Lanes | None:
    """Return lanes in memory that the device lends until the `stack` is left; None where the CPU merges."""
    if staging is None or workplace.device is None:
        return None
    stack.enter_context(_explain_memory(piece))
    there = stack.enter_context(workplace.device.lend(staging.lanes * staging.lane_bytes, staging.beside_bytes))
    return Lanes(torch.as_tensor(there), staging, workplace.device.streams())


def merge_there(
    ready: Ready, dtype: str, spans: Iterator[Span], work: Workspace, watch: Watch | None
) -> Iterator[tuple[Span, Arena]]:
    """Yield the slabs of what is merged on a device, each with its bytes as `dtype`, which are gone with the next.

    What a slab takes is gone with the one after the next: where there is but one lane, there is but one slab.
    """
    assert work.lanes is not None
    leaving: _Leaving | None = None
    for span in spans:
        before = leaving
        leaving = _send(span, ready.slab(span, work, dtype, watch), dtype, work)
        if before is not None:
            yield before.span, before.arrive(work.lanes)
    if leaving is not None:
        yield leaving.span, leaving.arrive(work.lanes)


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A slab on its way to the host."""

    span: Span
    value: Tensor  # on the device, held until it is copied
    copy: Tensor  # of it, on the host
    mark: Any

    def arrive(self, lanes: Lanes) -> Arena:
        """Return the slab's bytes once they are there."""
        lanes.wait(self.mark)
        array: Arena = self.copy.view(torch.uint8).numpy()
        return array


def _send(span: Span, value: Tensor, dtype: str, work: Workspace) -> _Leaving:
    assert work.lanes is not None
    copy = work.take_on_host((span.size,), dtype)
    value = value.contiguous().view(-1)
    return _Leaving(span, value, copy, work.lanes.get(copy, value))


@contextmanager
def _explain_memory(piece: Piece) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _is_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold slabs: memory that others on the device could have
        said, _, _ = str(error).partition("\n")
        raise RunError(
            f"{piece.tensor.name}: the device has not the memory that --device-memory promises; give less, "
            f"or free some: {said}"
        ) from None


def _is_of_memory(error: RuntimeError) -> bool:
    """Whether torch's allocator, CUDA itself or one of its libraries found too little memory on the device."""
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
