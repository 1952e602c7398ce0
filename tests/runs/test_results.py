"""TaskResults that workers tell unasked, and those that must be asked for all the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from distributed import Future
from runs.merging import hash_output, plan_merge

from mergemill.engine import run
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.clusters.results import TaskResults, tell_result
from mergemill.engine.runs.graph import make_tasks


@pytest.fixture(scope="module")
def plan(family: Path) -> Plan:
    return plan_merge("ties", family)  # a round of statistics, then the merge


@pytest.fixture(scope="module")
def expected(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of a merge by threads."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run(plan, out, workers=0)
    return hash_output(out)


@pytest.mark.slow
def test_no_result_of_a_merge_is_asked_for(
    plan: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Future, "result", lambda future, timeout=None: asked.append(future.key))
    run(plan, tmp_path / "out", workers=2)
    assert asked == []
    assert hash_output(tmp_path / "out") == expected


@pytest.mark.slow
def test_what_is_not_told_is_asked_for(
    plan: Plan, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TaskResults, "_hear", lambda results, event: None)
    committed = run(plan, tmp_path / "out", workers=2)
    assert committed.redone_parts == len(plan.parts)
    assert hash_output(tmp_path / "out") == expected


def test_tasks_name_their_functions_and_do_not_carry_them(plan: Plan) -> None:
    """Or each of ten thousand would be sent with a function of 3 kB, which Dask takes for no module's."""
    tasks = make_tasks(plan, plan.parts, [None] * len(plan.parts))  # type: ignore[list-item]
    functions = {spec.func for task in tasks for spec in dict(task.dask).values()}
    assert {function.__name__ for function in functions} == {"_gather", "_gather_rest", "_add", "_run"}
    assert max(len(cloudpickle.dumps(function)) for function in functions) < 100


class Scheduler:
    """What `TaskResults` needs of a client."""

    id, status = "client", "running"

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[Any], None]] = {}

    def subscribe_topic(self, topic: str, handler: Callable[[Any], None]) -> None:
        self.handlers[topic] = handler

    def unsubscribe_topic(self, topic: str) -> None:
        del self.handlers[topic]

    def log_event(self, topic: str, message: object) -> None:
        """As a worker does."""
        self.handlers[topic]((0.0, message))


class Asked:
    """A future whose result comes when it was asked for a few times, or never."""

    key, status = "merge-000001-token", "finished"

    def __init__(self, *answers: object, then: str = "finished") -> None:
        self.answers = list(answers)
        self.then = then
        self.released = 0

    def release(self) -> None:
        self.released += 1

    def result(self, timeout: float) -> object:
        assert timeout > 0
        answer = self.answers.pop(0)
        if not self.answers:
            self.status = self.then
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_result_is_told_once_and_by_the_last_worker_that_had_the_task() -> None:
    client: Any = Scheduler()
    results, worker = TaskResults(client), Worker(client)
    client.log_event("client", {"action": "add-client"})  # as Dask says
    for value in (["of a lost worker"], ["receipt"]):
        worker.data[Asked.key] = value
        tell_result(worker, Asked.key, "client")
    assert results.take(Asked(), look=pytest.fail) == ["receipt"]
    assert results.take(Asked(["asked"]), look=pytest.fail) == ["asked"]
    results.close()
    assert client.handlers == {}


@pytest.mark.parametrize("when", ["told before it is expected", "told afterwards", "asked for"])
def test_a_task_is_let_go_once_and_as_soon_as_its_result_is_here(when: str) -> None:
    """And not when it is taken: if its worker died until then, it would be run again."""
    client: Any = Scheduler()
    results, worker, future = TaskResults(client), Worker(client), Asked(["receipt"])
    worker.data[Asked.key] = ["receipt"]
    if when == "told before it is expected":
        tell_result(worker, Asked.key, "client")
    results.expect([future])
    assert future.released == (when == "told before it is expected")
    if when == "told afterwards":
        tell_result(worker, Asked.key, "client")
    assert future.released == results.is_told(future) == (when != "asked for")
    assert results.take(future, look=pytest.fail) == ["receipt"]
    tell_result(worker, Asked.key, "client")  # another worker had it too
    assert future.released == 1


def test_a_result_that_is_told_while_it_is_asked_for_counts() -> None:
    client: Any = Scheduler()
    results, worker = TaskResults(client), Worker(client)
    worker.data[Asked.key] = ["told"]
    future = Asked(TimeoutError(), OSError("cancelled"), then="cancelled")
    results.expect([future])
    assert results.take(future, lambda: tell_result(worker, Asked.key, "client")) == ["told"]


def test_what_was_told_can_be_taken_without_its_future() -> None:
    """Whose scheduler may be lost."""
    client: Any = Scheduler()
    results, worker = TaskResults(client), Worker(client)
    worker.data[Asked.key] = ["receipt"]
    tell_result(worker, Asked.key, "client")
    assert list(results.take_told()) == [(Asked.key, ["receipt"])]
    assert list(results.take_told()) == []


def test_statistics_are_told_to_nobody() -> None:
    client: Any = Scheduler()
    tell_result(Worker(client), "gather-name-round0-token-000000", "client")


class Worker:
    """What tells results."""

    def __init__(self, client: Scheduler) -> None:
        self.log_event: Any = client.log_event
        self.data: dict[str, object] = {}


def test_while_a_result_does_not_come_the_cluster_is_looked_at() -> None:
    looks: list[None] = []
    future = Asked(TimeoutError(), TimeoutError(), ["receipt"])
    assert TaskResults(Scheduler()).take(future, lambda: looks.append(None)) == ["receipt"]
    assert len(looks) == 2


@pytest.mark.parametrize("then", ["error", "cancelled"])
def test_a_task_that_fails_when_it_is_run_again_has_no_result(then: str) -> None:
    future = Asked(TimeoutError(), OSError("of the task"), then=then)
    assert TaskResults(Scheduler()).take(future, lambda: None) is None
    assert future.status == then


def test_an_error_that_is_not_the_tasks_is_told() -> None:
    with pytest.raises(OSError, match="of the connection"):
        TaskResults(Scheduler()).take(Asked(OSError("of the connection")), lambda: None)
