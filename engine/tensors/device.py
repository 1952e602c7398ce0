"""Where slabs are merged when that is not the CPU, and the few operations that a device would do in another way.

Single additions, multiplications, divisions and square roots are rounded by IEEE 754 on a GPU as they are on a CPU, so
that the bodies of the methods give the same bits there. Not all that torch calls a division is one: CUDA multiplies by
the reciprocal of a number, but divides by a tensor. What is added up is added in an order that is written down.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.lazy import Tensor, torch

Array = np.ndarray[Any, np.dtype[Any]]

NO_DOUBLE = ("mps", "xpu")  # of the second, some do
CPU_MADE = ("F8_E4M3", "F8_E5M2")  # outputs that the CPU merges: how they are rounded is not IEEE 754's to say
_ALIGN = 512  # bytes, as CUDA aligns what it allocates


def is_on_host(tensor: Tensor) -> bool:
    """Whether NumPy and native loops can look at the tensor."""
    return tensor.device.type == "cpu"


def has_double(tensor: Tensor) -> bool:
    """Whether the device on which the tensor lies knows float64."""
    return tensor.device.type not in NO_DOUBLE


def to_host(tensor: Tensor) -> Array:
    """Return the tensor as an array; a copy, where it lies on a device."""
    array: Array = tensor.cpu().numpy()
    return array


def put_beside(array: Array, like: Tensor) -> Tensor:
    """Return the array as a tensor of its own dtype, where `like` lies."""
    tensor = torch.from_numpy(array)
    return tensor if is_on_host(like) else like.new_empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def divide_(tensor: Tensor, divisor: float) -> Tensor:
    """Divide a tensor in place by a number, rounded once wherever it lies."""
    return tensor.div_(divisor) if is_on_host(tensor) else tensor.div_(tensor.new_full((), divisor))


def add_rows(rows: Tensor) -> Tensor:
    """Return the sum over the first axis, row after row, as a new tensor.

    >>> add_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([4., 6.])
    """
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total


def count_by_block(mask: Tensor, block: int) -> Array:
    """Return how many are true in each block of a flat mask that begins at one, int64."""
    whole = len(mask) // block * block
    counts = mask[:whole].view(-1, block).sum(1)
    return np.append(to_host(counts), to_host(mask[whole:].sum())) if whole < len(mask) else to_host(counts)


class Streams(Protocol):
    """How a device is fed: what is done in order, and what beside it."""

    def working(self) -> AbstractContextManager[Any]:
        """What is computed in the block waits for what was put in before."""

    def put(self, into: Tensor, host: Tensor) -> None:
        """Copy from the host; `host` is not changed until `wait`, or a mark that is made later, has passed."""

    def get(self, into: Tensor, value: Tensor) -> Any:
        """Copy to the host; returns a mark that has passed when it is there."""

    def mark(self) -> Any:
        """Return what has passed when all that was asked for so far is done."""

    def wait(self, mark: Any) -> None:
        """Return once a mark has passed; None is every one."""


class InOrder:
    """A device that does one thing after the other, of which nothing need be known."""

    def working(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def put(self, into: Tensor, host: Tensor) -> None:
        into.copy_(host)

    def get(self, into: Tensor, value: Tensor) -> Any:
        into.copy_(value)
        return None

    def mark(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        """All of it is done."""


class Overlapped:
    """Three streams of one device: copies in, work, copies out, each beside the others.

    The host's memory is pinned, or the copies would not be beside anything.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._inward, self._work, self._outward = (self._module.Stream(device=device) for _ in range(3))

    def working(self) -> AbstractContextManager[Any]:
        before = self._module.current_stream(self._device)  # the memory that is lent was allocated there
        self._inward.wait_stream(before)
        self._work.wait_stream(before)
        context: AbstractContextManager[Any] = self._module.stream(self._work)
        return context

    def put(self, into: Tensor, host: Tensor) -> None:
        with self._module.stream(self._inward):
            into.copy_(host, non_blocking=True)
        self._work.wait_stream(self._inward)

    def get(self, into: Tensor, value: Tensor) -> Any:
        self._outward.wait_stream(self._work)
        with self._module.stream(self._outward):
            into.copy_(value, non_blocking=True)
        return self._outward.record_event()

    def mark(self) -> Any:
        return self._work.record_event()

    def wait(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()
            return
        for stream in (self._inward, self._work, self._outward):
            stream.synchronize()


@dataclass(frozen=True, slots=True)
class Staging:
    """How the slabs of a tensor go by way of a device."""

    slab: int  # elements
    lanes: int
    host_lane_bytes: int  # of a slab as it is read and written
    lane_bytes: int  # of a slab on the device
    beside_bytes: int  # what is allocated there beside the lanes

    @property
    def host_bytes(self) -> int:
        """What all lanes take of the host's memory."""
        return self.lanes * self.host_lane_bytes

    @property
    def device_bytes(self) -> int:
        """What the tensor takes of the device's memory."""
        return self.lanes * self.lane_bytes + self.beside_bytes


class Lanes:
    """An arena on a device in equal lanes that slabs use by turns: one is filled while another is worked on.

    A lane is used again when all that was done in it has passed, also what copied into it and out of it; so each holds
    a place in the host's memory as well.
    """

    def __init__(self, arena: Tensor, staging: "Staging", streams: Streams) -> None:
        self.staging = staging
        count = staging.lanes
        self._arena = arena
        self._lane_bytes = staging.lane_bytes
        self._streams = streams
        self._marks: list[Any] = [None] * count
        self._at = self._low = 0
        self._working: AbstractContextManager[Any] | None = None

    def open(self) -> Self:
        """Work on the device from now on."""
        self._working = self._streams.working()
        self._working.__enter__()
        return self

    def close(self) -> None:
        """Return once nothing is on its way any more."""
        if self._working is not None:
            self._working.__exit__(None, None, None)
            self._working = None
        self._streams.wait(None)

    def turn(self) -> int:
        """Give the lane that was used to what it still does, and take the next; returns its number."""
        self._marks[self._at] = self._streams.mark()
        self._at = (self._at + 1) % self.staging.lanes
        self._streams.wait(self._marks[self._at])
        self._low = 0
        return self._at

    def settle(self) -> None:
        """Return once everything that was copied in is there."""
        self._streams.wait(None)

    def take(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Return an uninitialised tensor on the device that lives until the lane's next turn."""
        kind = TORCH_DTYPES[dtype]
        size_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        start = self._at * self._lane_bytes + self._low
        self._low += device_aligned(size_bytes)
        if self._low > self._lane_bytes:
            raise MemoryError(f"a slab needs {self._low} bytes of a lane of {self._lane_bytes} on the device")
        return self._arena[start : start + size_bytes].view(kind).view(*shape)

    def put(self, raw: Tensor) -> Tensor:
        """Return host bytes on the device."""
        into = self.take((len(raw),), "U8")
        self._streams.put(into, raw)
        return into

    def get(self, into: Tensor, value: Tensor) -> Any:
        """Begin to copy a tensor to the host; see `wait`."""
        return self._streams.get(into, value)

    def wait(self, mark: Any) -> None:
        """Return once what `get` began is there."""
        self._streams.wait(mark)


def device_aligned(size_bytes: int) -> int:
    """Return `size_bytes` rounded up to what a slab takes of a lane."""
    return -(-size_bytes // _ALIGN) * _ALIGN
