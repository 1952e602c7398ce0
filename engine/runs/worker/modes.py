"""The modes that arithmetic hangs on, and that a task would inherit from whoever calls it: set, and given back.

A merge's bytes are those of a process that has just begun, whatever its caller has set: no flush to zero, NumPy and
torch with their own defaults. What a thread has of its own is set in a task's thread alone. What torch has one of for
the process is set while merges run in it: a caller's other threads see it (decided 2026-11-29: torch has no other way).
Left alone, since no byte hangs on it: whether torch may only use deterministic operations.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.lazy import on_first_use


@contextmanager
def own_modes(*, one_thread: bool = True) -> Iterator[None]:
    """In the block, this thread computes as in a process that has just begun; afterwards as before.

    one_thread: whether torch has one thread, on which the last bits of its libraries hang. It has one in any case where
    denormals were flushed to zero: its other threads may have inherited that.
    """
    with ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))  # what comes of infinities is the guard's to tell
        was_plain = stack.enter_context(_plain_floats())
        stack.enter_context(_DEFAULTS.set())
        if one_thread or not was_plain:
            stack.enter_context(_THREADS.set())
        if "torch" in sys.modules:
            _enter_own_torch(stack)  # one that is loaded later has nothing set in this thread
        yield


@contextmanager
def torch_for_merges() -> Iterator[None]:
    """In the block, torch has its own defaults and one thread in the whole process, also when it is loaded later."""
    with _DEFAULTS.set(), _THREADS.set():
        yield


@contextmanager
def _plain_floats() -> Iterator[bool]:
    """Have this thread keep denormals; yields whether it did before."""
    if native.load() is None:
        was_plain = not _flushes()
        if not was_plain:
            _flush(False)
        try:
            yield was_plain
        finally:
            if not was_plain:
                _flush(True)
        return
    was_plain, before = native.plain_floats()
    try:
        yield was_plain
    finally:
        native.restore_floats(before)


def _flushes() -> bool:
    """Whether denormals are flushed to zero in this thread, as results or as operands."""
    least, more = sys.float_info.min, float(1 << 60)
    return least / 2 == 0.0 or sys.float_info.min * sys.float_info.epsilon * more == 0.0


def _flush(on: bool) -> None:
    import torch

    torch.set_flush_denormal(on)


def _enter_own_torch(stack: ExitStack) -> None:
    import torch

    stack.enter_context(torch.inference_mode(False))  # its tensors could not be changed afterwards
    stack.enter_context(torch.set_grad_enabled(True))  # as in any thread; what is merged asks for no gradients
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    if torch.get_default_device().type != "cpu":  # else all that torch does would be slower
        stack.enter_context(torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class _Value:
    """Something that torch has one of for the process."""

    find: Callable[[Any], Any]  # given torch
    put: Callable[[Any, Any], None]  # given torch and the value
    make: Callable[[Any], Any]  # given torch: what merges want


class _Values:
    """What torch has one of for the process: as merges want it while they run, afterwards as before.

    torch may be loaded already, be loaded by the first task that needs it, or never be. What somebody has set meanwhile
    stays so.
    """

    def __init__(self, values: Sequence[_Value]) -> None:
        self._values = values
        self._lock = threading.Lock()
        self._merges = 0
        self._before: list[Any] | None = None  # None: torch is not loaded, or no merge runs
        on_first_use(self._set_late)

    @contextmanager
    def set(self) -> Iterator[None]:
        with self._lock:
            self._merges += 1
            if "torch" in sys.modules:
                self._set()
        try:
            yield
        finally:
            with self._lock:
                self._merges -= 1
                if not self._merges:
                    self._give_back()

    def _set_late(self) -> None:
        with self._lock:
            if self._merges:
                self._set()

    def _set(self) -> None:
        # Not by way of `lazy`, which may hold its own lock and wait for the one held here.
        import torch

        if self._before is None:
            self._before = [value.find(torch) for value in self._values]
            for value in self._values:
                value.put(torch, value.make(torch))

    def _give_back(self) -> None:
        if self._before is None:
            return
        import torch

        for value, before in zip(self._values, self._before, strict=True):
            if value.find(torch) == value.make(torch):
                value.put(torch, before)
        self._before = None


_THREADS = _Values(
    [
        _Value(
            find=lambda torch: torch.get_num_threads(),
            put=lambda torch, count: torch.set_num_threads(count),
            make=lambda torch: 1,
        )
    ]
)
_DEFAULTS = _Values(
    [
        _Value(
            find=lambda torch: torch.get_default_dtype(),
            put=lambda torch, dtype: torch.set_default_dtype(dtype),
            make=lambda torch: torch.float32,
        ),
        _Value(  # else products of float32 may be made of bfloat16 or TF32
            find=lambda torch: torch.get_float32_matmul_precision(),
            put=lambda torch, precision: torch.set_float32_matmul_precision(precision),
            make=lambda torch: "highest",
        ),
    ]
)
