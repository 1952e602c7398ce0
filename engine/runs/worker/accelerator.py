"""The accelerator that a worker merges on: whether there is one, its memory, its streams, and pinned memory for it."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from mergemill.engine.errors import PlanError, RunError
from mergemill.engine.plan.sizes import format_size
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.worker.workplace import DevicePlace
from mergemill.engine.tensors.device import InOrder, Overlapped, Streams
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.workspace import Arena

KINDS = ("cuda", "xpu", "mps")  # in the order in which `auto` looks for them
DEVICES = ("cpu", "auto", *KINDS)
"""What may be asked for."""
_SLACK = 1.25  # what torch's allocator may hold of a device, as a multiple of what is promised
_BESIDE_BYTES = 128 << 20  # and beside it for each thread: it takes whole segments, and cuBLAS a workspace a stream
_OPENING = threading.Lock()


def count_devices(kind: str) -> int:
    """Return how many devices of a kind there are here."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return int(module.device_count()) if module.is_available() else 0


def choose_device(asked: str, plan: Plan, *, here: bool) -> str:
    """Return the kind of device that the workers merge on, ``cpu`` where on none.

    ``auto`` is the first that is there, where the plan decomposes or multiplies whole matrices, which gain by it. here:
    whether the workers are on this machine. Raises `PlanError` where there is none of the kind that is `asked`.
    """
    if asked == "cpu":
        return asked
    if asked not in DEVICES:
        raise PlanError(f"--device {asked}: must be {', '.join(DEVICES)}")
    if asked == "auto":
        if not here:
            raise PlanError("--device auto looks at this machine, and the workers are elsewhere; say cuda or cpu")
        return next(filter(count_devices, KINDS), "cpu") if _takes_matrices(plan) else "cpu"
    if here and not count_devices(asked):
        raise PlanError(f"--device {asked}: torch finds no such device here; --device cpu merges without one")
    return asked


def open_device(kind: str, memory_bytes: int, threads: int) -> DevicePlace | None:
    """Return the device that this process merges on, its first one; None for the CPU.

    Raises `RunError` where it is not there, does not work, or has less memory than is promised.
    """
    if kind == "cpu":
        return None
    if not count_devices(kind):
        raise RunError(f"this worker was to merge on {kind}, and torch finds no such device here")
    total_bytes = _total_bytes(kind)
    if total_bytes < memory_bytes:
        raise RunError(
            f"--device-memory promises {format_size(memory_bytes)} and the {kind} device has {format_size(total_bytes)}"
        )
    if kind == "cuda":
        with _OPENING:
            _load_linalg()
    return Accelerator(kind, memory_bytes, threads)


@cache
def _load_linalg() -> None:
    """Have torch load its library of decompositions: threads that are the first to need it together would fail.

    So pytorch/pytorch#90613: "lazy wrapper should be called at most once".
    """
    try:
        torch.linalg.eigh(torch.eye(2, device="cuda:0"))
    except RuntimeError as error:
        said, _, _ = str(error).partition("\n")
        raise RunError(f"the cuda device here does not work: {said}") from None


class _Promises:
    """What torch may take of the CUDA device: what it held already, and what the merges of this process may take.

    Afterwards it is as before: its limit, and what is free goes back to the device, where other streams can have it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._promised: list[int] = []  # bytes, of each merge
        self._held_bytes = 0
        self._before = 1.0  # share of the device

    def enter(self, most_bytes: int) -> None:
        with self._lock:
            if not self._promised:
                torch.cuda.empty_cache()
                self._held_bytes = torch.cuda.memory_reserved(0)
                self._before = torch.cuda.get_per_process_memory_fraction(0)
            self._promised.append(most_bytes)
            try:
                self._limit()
            except BaseException:
                self._promised.remove(most_bytes)
                raise

    def leave(self, most_bytes: int) -> None:
        with self._lock:
            self._promised.remove(most_bytes)
            self._limit()
            with suppress(RuntimeError):  # of a device that is lost, which the merge's own error tells
                torch.cuda.empty_cache()

    def _limit(self) -> None:
        share = (self._held_bytes + sum(self._promised)) / _total_bytes("cuda")
        torch.cuda.set_per_process_memory_fraction(min(self._before, share) if self._promised else self._before, 0)


_PROMISES = _Promises()


class Accelerator(DevicePlace):
    """The memory of a device that is there."""

    def __init__(self, kind: str, memory_bytes: int, threads: int) -> None:
        super().__init__(memory_bytes, threads)
        self.kind = kind
        self._here = threading.local()  # of a thread: its streams

    def streams(self) -> Streams:
        """Return three streams of the device; one after the other where it has none.

        A thread has the same ones for all its tasks: what is freed on a stream is used again on that alone.
        """
        if not hasattr(self._here, "streams"):
            self._here.streams = InOrder() if self.kind == "mps" else Overlapped(f"{self.kind}:0")
        streams: Streams = self._here.streams
        return streams

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Have torch refuse what is far beyond the promise and what is held already: the gate keeps the promise."""
        if self.kind != "cuda":
            yield
            return
        most_bytes = int(_SLACK * self.memory_bytes) + self.threads * _BESIDE_BYTES
        _PROMISES.enter(most_bytes)
        try:
            yield
        finally:
            self.drop_free()
            _PROMISES.leave(most_bytes)

    def pin(self, arena: Arena) -> None:
        """Pin the arena for as long as it is there; only CUDA needs that told."""
        if self.kind != "cuda":
            return
        try:
            pin_memory(arena, torch.cuda.cudart())
        except RunError:
            with suppress(RuntimeError):  # CUDA tells it once more, to this thread's next kernel: let it be this one
                torch.ones(1, device="cuda:0")
            raise

    def _map(self, size_bytes: int) -> Any:
        arena: Tensor = torch.empty(size_bytes, dtype=torch.uint8, device=f"{self.kind}:0")
        return arena


def pin_memory(arena: Arena, runtime: Any) -> None:
    """Have CUDA's `runtime` pin an arena until it goes; `RunError` where the system does not let it."""
    address, register = arena.ctypes.data, runtime.cudaHostRegister
    if error := int(register(address, len(arena), 0)):
        raise RunError(
            f"CUDA error {error}: {format_size(len(arena))} of memory cannot be pinned; free memory, or give a smaller "
            "--memory; the limit of locked memory (ulimit -l) may be too low; --device cpu pins none"
        )
    unregister: Callable[[int], Any] = runtime.cudaHostUnregister
    weakref.finalize(arena, unregister, address).atexit = False


def _total_bytes(kind: str) -> int:
    if kind == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(getattr(torch, kind).get_device_properties(0).total_memory)


def _takes_matrices(plan: Plan) -> bool:
    return any(piece.tensor.expression.takes_matrices for part in plan.parts for piece in part.pieces)
