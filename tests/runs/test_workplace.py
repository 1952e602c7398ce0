"""The gate: first come first served, never above the promise, and no request waits for ever."""

import random
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemill.engine.errors import RunError
from mergemill.engine.runs.worker import workplace as workplace_module
from mergemill.engine.runs.worker.workplace import Workplace

MIB = 1 << 20


@contextmanager
def threads(*targets: threading.Thread) -> Iterator[None]:
    yield
    for thread in targets:
        thread.join(20)
    assert not any(thread.is_alive() for thread in targets), "a thread waits for ever"


def wait_until_queued(workplace: Workplace, count: int) -> None:
    end = time.monotonic() + 10
    while len(workplace._queue) < count:
        assert time.monotonic() < end
        time.sleep(0.001)


class Borrower(threading.Thread):
    """Borrows in a thread of its own, notes when it had its turn, and gives back when told."""

    def __init__(self, workplace: Workplace, size_bytes: int, turns: list[str], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.workplace, self.size_bytes, self.turns = workplace, size_bytes, turns
        self.had_turn, self.may_leave = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with self.workplace.lend(self.size_bytes):
                self.turns.append(self.name)
                self.had_turn.set()
                assert self.may_leave.wait(20)
        except MemoryError as error:
            self.error = error


def queue_up(workplace: Workplace, sizes: dict[str, int]) -> tuple[list[Borrower], list[str]]:
    """Start a borrower after the other, each queued before the next begins."""
    turns: list[str] = []
    borrowers = [Borrower(workplace, size, turns, name) for name, size in sizes.items()]
    for borrower in borrowers:
        before = len(workplace._queue)
        borrower.start()
        if not borrower.had_turn.wait(0.05):
            wait_until_queued(workplace, before + 1)
    return borrowers, turns


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    workplace = Workplace(10 * MIB, 4)
    borrowers, turns = queue_up(workplace, {"first": 6 * MIB, "large": 9 * MIB, "small": MIB, "tiny": 1})
    first, large, small, tiny = borrowers
    with threads(*borrowers):
        assert turns == ["first"], "there is room for the small ones, but the large one came before them"
        first.may_leave.set()
        assert large.had_turn.wait(10)
        assert small.had_turn.wait(10)
        assert turns == ["first", "large", "small"]
        assert not tiny.had_turn.wait(0.05), "9 + 1 MiB are lent, and a whole MiB is the least"
        for borrower in borrowers:
            borrower.may_leave.set()
    assert turns == ["first", "large", "small", "tiny"]


def test_a_large_request_has_its_turn_among_a_stream_of_small_ones() -> None:
    workplace = Workplace(8 * MIB, 8)
    over = threading.Event()

    def borrow_small() -> None:
        while not over.is_set():
            with workplace.lend(MIB):
                time.sleep(0.001)

    small = [threading.Thread(target=borrow_small, daemon=True) for _ in range(6)]
    with threads(*small):
        for thread in small:
            thread.start()
        for _ in range(20):
            large = Borrower(workplace, 8 * MIB, [], "large")
            large.may_leave.set()
            large.start()
            assert large.had_turn.wait(10), "the large request is starved"
        over.set()


@settings(max_examples=25, deadline=None)
@given(
    promise=st.integers(MIB, 40 * MIB),
    count=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_never_more_than_the_promise_is_lent(promise: int, count: int, seed: int) -> None:
    workplace = Workplace(promise, count)
    lent, most, lock = [0], [0], threading.Lock()
    problems: list[str] = []

    def borrow(number: int) -> None:
        source = random.Random(seed * 31 + number)
        for _ in range(15):
            size = source.randint(1, promise)
            with workplace.lend(size) as arena:
                if len(arena) < size:
                    problems.append(f"asked for {size}, got {len(arena)}")
                with lock:
                    lent[0] += len(arena)
                    most[0] = max(most[0], lent[0])
                arena[:: 1 << 16] = number
                if source.random() < 0.3:
                    time.sleep(0.0005)
                if not bool((arena[:: 1 << 16] == number).all()):
                    problems.append("two tasks share an arena")
                with lock:
                    lent[0] -= len(arena)

    workers = [threading.Thread(target=borrow, args=(number,), daemon=True) for number in range(count)]
    with threads(*workers):
        for worker in workers:
            worker.start()
    assert problems == []
    assert 0 < most[0] <= workplace.peak_bytes <= promise
    assert workplace._lent_bytes == 0
    assert sum(len(arena) for arena in workplace._free) <= promise, "arenas kept for later count as well"


def test_an_arena_is_used_again() -> None:
    workplace = Workplace(16 * MIB, 2)
    with workplace.lend(3 * MIB) as first:
        address = first.ctypes.data
    with workplace.lend(2 * MIB + 1) as second:
        assert second.ctypes.data == address
        with workplace.lend(3 * MIB) as third:
            assert third.ctypes.data != address


def test_a_process_keeps_no_more_arenas_than_it_has_threads() -> None:
    workplace = Workplace(64 * MIB, 2)
    for size in (1, 2, 3, 4, 5):
        with workplace.lend(size * MIB), workplace.lend(size * MIB):
            assert workplace._lent + len(workplace._free) <= 2
    assert [len(arena) for arena in workplace._free] == [5 * MIB, 5 * MIB]


def test_an_arena_that_is_dropped_goes_back_to_the_kernel() -> None:
    """Small ones too, which malloc would keep for later, beside the promise."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    arenas = [workplace_module._map_arena(5 * MIB) for _ in range(40)]
    for arena in arenas:
        arena.fill(1)
    assert resident_bytes() - before > 190 * MIB
    arenas.clear()
    assert resident_bytes() - before < 20 * MIB


def test_free_arenas_make_room_for_a_larger_one() -> None:
    workplace = Workplace(8 * MIB, 4)
    with workplace.lend(3 * MIB), workplace.lend(4 * MIB):
        pass
    with workplace.lend(7 * MIB) as arena:
        assert len(arena) == 7 * MIB
    assert sum(len(free) for free in workplace._free) <= 8 * MIB


def test_a_request_beyond_the_promise_is_refused_with_both_numbers() -> None:
    workplace = Workplace(5 * MIB, 1)
    with (
        pytest.raises(RunError, match=f"needs {5 * MIB + 1} bytes and this worker was promised {5 * MIB}"),
        workplace.lend(5 * MIB + 1),
    ):
        pass
    with workplace.lend(5 * MIB) as arena:
        assert len(arena) == 5 * MIB


def test_a_promise_that_is_no_whole_number_of_steps_can_be_lent_whole() -> None:
    workplace = Workplace(MIB + 7, 1)
    with workplace.lend(MIB + 7) as arena:
        assert len(arena) == MIB + 7


def test_an_error_in_a_task_gives_its_memory_back() -> None:
    workplace = Workplace(4 * MIB, 1)
    with pytest.raises(ValueError, match="of the task"), workplace.lend(4 * MIB):
        raise ValueError("of the task")
    with workplace.lend(4 * MIB):
        assert workplace.peak_bytes == 4 * MIB


def test_what_a_task_allocates_itself_counts_as_lent() -> None:
    workplace = Workplace(8 * MIB, 2)
    with workplace.lend(MIB):
        pass  # leaves an arena, which counts as well
    with workplace.lend(6 * MIB), pytest.raises(RunError, match=f"needs {9 * MIB} bytes"), workplace.lend(MIB, 8 * MIB):
        pass
    with workplace.lend(3 * MIB, 5 * MIB) as arena:
        assert len(arena) == 3 * MIB
        assert workplace._free == []
    assert workplace.peak_bytes == 8 * MIB
    with workplace.lend(2 * MIB, 5 * MIB) as arena:
        assert len(arena) == 3 * MIB, "the one that is there"
    with workplace.lend(MIB, 6 * MIB) as arena:
        assert len(arena) == MIB, "the one that is there would be too much"
    assert workplace._lent_bytes == 0


def test_a_task_waits_for_what_another_one_allocates() -> None:
    workplace = Workplace(8 * MIB, 2)
    turns: list[str] = []
    later = Borrower(workplace, 4 * MIB, turns, "later")
    with threads(later):
        with workplace.lend(MIB, 4 * MIB):
            later.start()
            wait_until_queued(workplace, 1)
            assert not later.had_turn.wait(0.05)
        assert later.had_turn.wait(10)
        later.may_leave.set()


def test_a_request_that_finds_no_memory_lets_the_next_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = Workplace(4 * MIB, 3)
    borrowers, _ = queue_up(workplace, {"holder": 4 * MIB, "unlucky": 3 * MIB, "next": 4 * MIB})
    holder, unlucky, following = borrowers
    make_arena = workplace_module._map_arena

    def fail_once(size_bytes: int) -> object:
        monkeypatch.setattr(workplace_module, "_map_arena", make_arena)
        raise MemoryError

    with threads(*borrowers):
        monkeypatch.setattr(workplace, "_free", NeverReused())
        monkeypatch.setattr(workplace_module, "_map_arena", fail_once)
        holder.may_leave.set()
        assert following.had_turn.wait(10)
        following.may_leave.set()
    assert isinstance(unlucky.error, MemoryError)


class NeverReused(list):  # type: ignore[type-arg]
    """A list of free arenas that forgets what it is given."""

    def append(self, arena: object) -> None:
        """Drop `arena`."""


def test_a_stopped_worker_ends_its_tasks() -> None:
    workplace = Workplace(MIB, 1)
    workplace.check_going()
    workplace.stopping = True
    with pytest.raises(RunError, match="being stopped"):
        workplace.check_going()
