"""The memory of one task: an arena that slabs and read buffers are taken from, and given back to all at once."""

import functools
import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from mergemill.engine.storage.cache import RangeCache
from mergemill.engine.storage.fetch import Fetch
from mergemill.engine.storage.ranges import Pin, is_remote, read_into, reads_apart
from mergemill.engine.storage.store import ENVIRONMENT, Storage
from mergemill.engine.tensors.device import Lanes
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.gathered import Places, read_ranges
from mergemill.engine.tensors.lazy import Tensor, torch

T = TypeVar("T")

Arena = np.ndarray[tuple[int], np.dtype[np.uint8]]  # flat memory that is lent

NOTES_BYTES = 8 << 20  # beside the arena, of what malloc may take
_ALIGN = 64  # bytes; a cache line, and a multiple of every dtype's size


def aligned(size_bytes: int) -> int:
    """Return `size_bytes` rounded up to what a slab takes of the arena."""
    return -(-size_bytes // _ALIGN) * _ALIGN


def tensor_of(arena: Arena) -> Tensor:
    """Return flat memory as a tensor of bytes."""
    if not len(arena):
        return torch.empty(0, dtype=torch.uint8)  # torch gives an empty array a stride that cannot be viewed
    return torch.from_numpy(arena)


def bytes_of(tensor: Tensor) -> Arena:
    """Return a tensor on the host as its bytes, flat."""
    array: Arena = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return array


@dataclass(slots=True)
class _Held:
    """A range of a file that lies in one piece in the arena."""

    offset_bytes: int
    size_bytes: int
    start: int  # in the arena
    read_bytes: int = 0  # so far, from its beginning
    fetch: Fetch | None = None  # of a remote file: on its way


@dataclass(frozen=True, slots=True)
class _Coming:
    """A range of a remote file on its way into the arena."""

    url: str
    offset_bytes: int
    size_bytes: int
    start: int  # in the arena
    fetch: Fetch


class Results:
    """What a task has computed last of that which gives several tensors: the next of them finds it here."""

    def __init__(self) -> None:
        self._of: object = None
        self._found: Sequence[Tensor] = ()

    def find(self, computation: object, compute: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return what `compute` gives, called once for a computation until there is another."""
        if self._of is not computation:
            self._found = ()  # so that two are never held at once
            self._found, self._of = compute(), computation
        return self._found


class Lasting:
    """What the tasks of one process need alike, beside their memory: what was made last is there for the next."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._found: Any = None
        self._lock = threading.Lock()

    def find(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` gives, called once for a key until there is another."""
        with self._lock:
            if self._found is None or self._key != key:
                self._found = None
                self._found, self._key = make(), key
            found: T = self._found
            return found


class Workspace:
    """Hands out flat tensors that lie in `arena`, and never allocates.

    What is taken for a slab is gone at the next `next_slab`; with `keep`, the bytes that were read stay until the
    workspace is dropped, so that a second pass over the same inputs reads nothing, and so do notes, up to `NOTES_BYTES`
    beside the arena. Ranges that are held lie in one piece, so that a pass may take all slabs at once.

    Remote ranges come into the arena while others are worked on: those that are held, and those that were asked for by
    `fetch`; all as `storage` says, by way of `cache`, where there is one. Nothing writes into the arena any more once
    the workspace is closed.

    With `lanes`, slabs lie on a device: what is read goes there as it is stored, and slabs take turns here as well.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        keep: bool = False,
        storage: Storage = ENVIRONMENT,
        cache: RangeCache | None = None,
        lanes: Lanes | None = None,
        results: Results | None = None,
        lasting: Lasting | None = None,
    ) -> None:
        self._arena = arena
        self._raw = arena.data
        self._keep = keep
        self._storage = storage
        self._cache = cache
        self.lanes = lanes
        self.results = results or Results()
        self.lasting = lasting or Lasting()
        self._found: dict[tuple[str, int], tuple[int, int]] = {}  # what was read: where in the arena, and how much
        self._held: dict[str, list[_Held]] = {}
        self._notes: dict[tuple[int, ...], Arena] = {}
        self._notes_bytes = 0
        self._shared: dict[Hashable, tuple[int, Any]] = {}  # made of this slab: from where on in the arena, and what
        self._coming: dict[int, list[_Coming]] = {}  # by slot
        self._low = 0  # slabs grow up from here
        self._high = len(arena) // _ALIGN * _ALIGN  # kept reads grow down from here
        self.read_bytes = 0  # read from storage so far
        self.pins: set[Pin] = set()  # of the files that were read

    def __enter__(self) -> Self:
        """The workspace is closed when the block ends."""
        if self.lanes is not None:
            self.lanes.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Return once nothing writes into the arena any more."""
        self.leave_device()
        for slot in list(self._coming):
            self.drop(slot)
        for held in (held for ranges in self._held.values() for held in ranges):
            if held.fetch is not None:
                held.fetch.cancel()

    def leave_device(self) -> None:
        """Have slabs on the CPU from now on."""
        if self.lanes is not None:
            self.lanes.close()
            self.lanes = None

    @property
    def keeps(self) -> bool:
        """Whether what was read stays."""
        return self._keep

    def hold(self, pin: Pin, offset_bytes: int, size_bytes: int) -> None:
        """Keep the place for a range that will be read from its first byte to its last, in one piece."""
        ranges = self._held.setdefault(pin.url, [])
        if all(held.offset_bytes != offset_bytes or held.size_bytes != size_bytes for held in ranges):
            self.pins.add(pin)
            held = _Held(offset_bytes, size_bytes, self._take_kept(size_bytes))
            ranges.append(held)
            if is_remote(pin.url):
                into = self._raw[held.start : held.start + size_bytes]
                held.fetch = Fetch(pin, offset_bytes, into, self._storage, self._cache)

    def reserve(self, size_bytes: int, most: int, beside_bytes: int) -> list[int]:
        """At the start of a pass, take up to `most` slots of `size_bytes` for `fetch`, and leave `beside_bytes`.

        What was reserved before is given back; a workspace that keeps what it reads has none.
        """
        if self._keep or size_bytes <= 0:
            return []
        for slot in list(self._coming):
            self.drop(slot)
        top = len(self._arena) // _ALIGN * _ALIGN
        count = max(0, min(most, (top - aligned(beside_bytes)) // size_bytes))
        self._high = top - count * size_bytes
        return [self._high + i * size_bytes for i in range(count)]

    def fetch(self, slot: int, ranges: Iterable[tuple[Pin, int, int]]) -> None:
        """Begin to fetch ranges (pin, offset and size in bytes) of remote files into a slot that is free."""
        self._coming[slot], start = [], slot
        for pin, offset_bytes, size_bytes in ranges:
            fetch = Fetch(pin, offset_bytes, self._raw[start : start + size_bytes], self._storage, self._cache)
            self.pins.add(pin)
            self._coming[slot].append(_Coming(pin.url, offset_bytes, size_bytes, start, fetch))
            self.read_bytes += size_bytes
            start += aligned(size_bytes)

    def drop(self, slot: int) -> None:
        """Make a slot free again."""
        if self.lanes is not None:
            self.lanes.settle()  # a device may still copy from it
        for coming in self._coming.pop(slot, ()):
            coming.fetch.cancel()

    def next_slab(self) -> None:
        """Give back what the last slab took."""
        self._low = 0 if self.lanes is None else self.lanes.turn() * self.lanes.staging.host_lane_bytes
        self._shared.clear()
        if not self._keep:
            self._found.clear()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Give back at the end of the block what was taken and read in it."""
        low, found = self._low, dict(self._found)
        yield
        self._give_back(low)
        if not self._keep:
            self._found = found

    def take(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return an uninitialised tensor that lives until the next slab."""
        if self.lanes is not None:
            return self.lanes.take(shape, dtype)
        return self.take_on_host(shape, dtype)

    def decode(self, raw: Tensor, stored: str, dtype: str) -> Tensor:
        """Return bytes that were read, `raw`, of dtype `stored`, as a tensor of `dtype` that may be overwritten."""
        values = (raw if self.lanes is None else self.lanes.put(raw)).view(TORCH_DTYPES[stored])
        return self.take((len(values),), dtype).copy_(values)

    def take_on_host(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return an uninitialised tensor in the arena that lives until the next slab."""
        kind = TORCH_DTYPES[dtype]
        size_bytes = math.prod(shape) * kind.itemsize
        start = self._take_low(size_bytes)
        return self._whole[start : start + size_bytes].view(kind).view(shape)

    def take_bytes(self, size_bytes: int) -> Arena:
        """Return uninitialised memory that lives until the next slab."""
        start = self._take_low(size_bytes)
        return self._arena[start : start + size_bytes]

    def read(self, pin: Pin, offset_bytes: int, size_bytes: int) -> Tensor:
        """Return a range of a stored file as flat uint8; the caller does not change it."""
        start = self._read(pin, offset_bytes, size_bytes)
        return self._whole[start : start + size_bytes]

    def read_array(self, pin: Pin, offset_bytes: int, size_bytes: int) -> Arena:
        """Return a range of a stored file; the caller does not change it."""
        start = self._read(pin, offset_bytes, size_bytes)
        return self._arena[start : start + size_bytes]

    def reads_apart(self, pin: Pin) -> bool:
        """Whether ranges of a file may be read where they belong: it is of this machine, and no range of it is kept."""
        return not self._keep and pin.url not in self._held and reads_apart(pin, self._storage)

    def read_apart(self, pin: Pin, offsets: Places, places: Places, sizes: Places, into: Arena) -> None:
        """Fill `sizes[i]` bytes from `places[i]` of `into`, memory that was taken here, with the file's."""
        self.pins.add(pin)
        read_ranges(pin, offsets, places, sizes, into)
        self.read_bytes += int(sizes.sum())

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Give back at the end of the block what is taken in it, but for what is kept."""
        low = self._low
        yield
        self._give_back(low)
        if not self._keep:
            self._found = {key: place for key, place in self._found.items() if place[0] < low}

    def _give_back(self, low: int) -> None:
        """Give back what was taken since the arena was full up to `low`, and forget what was made there."""
        self._low = low
        self._shared = {key: place for key, place in self._shared.items() if place[0] < low}

    def find_shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` gives, called once a slab: what several expressions take of the same one."""
        if key not in self._shared:
            low = self._low
            made = make()
            self._shared[key] = low, made
        found: T = self._shared[key][1]
        return found

    def note(self, key: tuple[int, ...], value: Arena) -> None:
        """Keep something small that a later pass would find again; nothing is kept beyond `NOTES_BYTES`."""
        if self._keep and self._notes_bytes + len(value) <= NOTES_BYTES:
            self._notes[key] = value
            self._notes_bytes += len(value)

    def find_note(self, key: tuple[int, ...]) -> Arena | None:
        """Return what was noted under `key`."""
        return self._notes.get(key)

    def _read(self, pin: Pin, offset_bytes: int, size_bytes: int) -> int:
        """Return where in the arena the range lies, read there unless it was kept, or wanted for this slab before."""
        for held in self._held.get(pin.url, ()):
            if held.offset_bytes <= offset_bytes and offset_bytes + size_bytes <= held.offset_bytes + held.size_bytes:
                return self._read_held(pin, held, offset_bytes, size_bytes)
        for coming in (coming for slot in self._coming.values() for coming in slot):
            at = offset_bytes - coming.offset_bytes
            if coming.url == pin.url and at >= 0 and at + size_bytes <= coming.size_bytes:
                coming.fetch.wait(at + size_bytes)
                return coming.start + at
        key = (pin.url, offset_bytes)
        start, found_bytes = self._found.get(key, (0, -1))
        if found_bytes == size_bytes:
            return start
        self.pins.add(pin)
        start = self._take_kept(size_bytes) if self._keep else self._take_low(size_bytes)
        read_into(pin, offset_bytes, self._raw[start : start + size_bytes], self._storage, self._cache)
        self.read_bytes += size_bytes
        self._found[key] = (start, size_bytes)
        return start

    def _read_held(self, pin: Pin, held: "_Held", offset_bytes: int, size_bytes: int) -> int:
        """Return where the range lies, read as far as it was not."""
        start, stop = offset_bytes - held.offset_bytes, offset_bytes - held.offset_bytes + size_bytes
        if stop > held.read_bytes:
            into = self._raw[held.start + held.read_bytes : held.start + stop]
            if held.fetch is not None:
                held.fetch.wait(stop)
            else:
                read_into(pin, held.offset_bytes + held.read_bytes, into, self._storage)
            self.read_bytes += len(into)
            held.read_bytes = stop
        return held.start + start

    @functools.cached_property
    def _whole(self) -> Tensor:
        return tensor_of(self._arena)

    def _take_low(self, size_bytes: int) -> int:
        start = self._low
        self._check_room(aligned(size_bytes))
        self._low += aligned(size_bytes)
        return start

    def _take_kept(self, size_bytes: int) -> int:
        self._check_room(aligned(size_bytes))
        self._high -= aligned(size_bytes)
        return self._high

    def _check_room(self, size_bytes: int) -> None:
        if self._low + size_bytes > self._high:
            raise MemoryError(f"a slab needs {self._low + size_bytes} bytes of a workspace of {self._high}")
