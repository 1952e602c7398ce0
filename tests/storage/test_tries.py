"""Requests that are made again: how often, with what pauses between, and what is said in the end."""

from collections.abc import Callable

import pytest

from mergemill.engine.errors import StorageError
from mergemill.engine.storage import tries
from mergemill.engine.storage.store import Unavailable
from mergemill.engine.storage.tries import BEFORE, DURING, Patience, ask_patiently, count_retries, insist


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, the longest that may be, and no time lost."""
    made: list[float] = []
    monkeypatch.setattr(tries.time, "sleep", made.append)
    monkeypatch.setattr(tries.random, "uniform", lambda _, most: most)
    return made


def fail(times: int) -> Callable[[], str]:
    """Return what fails so many times, each with its number, and then does not."""
    failed = 0

    def ask() -> str:
        nonlocal failed
        if failed == times:
            return "done"
        failed += 1
        raise Unavailable(f"fault {failed}")

    return ask


def test_what_succeeds_in_the_end_is_returned_and_each_failure_counted(waits: list[float]) -> None:
    before = count_retries()
    assert insist(fail(DURING.attempts - 1), "reading") == "done"
    assert count_retries() - before == len(waits) == 7


def test_pauses_double_up_to_the_longest(waits: list[float]) -> None:
    insist(fail(7), "reading")
    assert waits == [0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_after_the_last_attempt_the_error_says_what_was_done_how_often_and_what_failed_last(
    waits: list[float],
) -> None:
    with pytest.raises(StorageError) as caught:
        insist(fail(100), "s3://bucket/key: reading")
    assert str(caught.value) == "s3://bucket/key: reading failed 8 times, at last with: fault 8"


def test_before_a_merge_there_are_fewer_attempts_and_the_last_fault_is_told_as_it_is(waits: list[float]) -> None:
    with pytest.raises(Unavailable, match="fault 4"):
        ask_patiently(fail(100), BEFORE)
    assert waits == [0.4, 0.8, 1.6]


def test_there_are_no_more_attempts_once_they_have_taken_long_enough(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 15.0, 15.1])
    monkeypatch.setattr(tries.time, "monotonic", lambda: next(clock))
    with pytest.raises(Unavailable, match="fault 3"):
        ask_patiently(fail(100), Patience(8, enough_s=15.0))


def test_other_errors_are_not_tried_again(waits: list[float]) -> None:
    def ask() -> None:
        raise StorageError("no such bucket")

    with pytest.raises(StorageError, match="no such bucket"):
        insist(ask, "reading")
    assert waits == []
