"""What tasks return, told by their workers with the news that they are done.

To ask for each result takes four messages more, through the scheduler: about a sixth of a driver's CPU time.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distributed import Client, Worker

ASK_S = 1.0  # between two looks while a result that was not told is on its way
_WITHOUT = ("cancelled", "error")  # states of a future that has no result
_ANSWERS = ("merge-", "check-")  # how the keys of tasks begin whose results the driver takes


def tell_result(worker: Worker, key: str, topic: str) -> None:
    """Send the result of a task, which a worker has just kept, to whoever listens to `topic`."""
    if key.startswith(_ANSWERS):
        worker.log_event(topic, {"key": key, "result": pickle.dumps(worker.data[key])})


class TaskResults:
    """Takes what workers tell the client: the topic is its own id, which its scheduler forgets with it.

    A task whose result is told is let go at once, in whichever thread hears of it: while it is wanted, it is run again
    if its worker dies.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._told: dict[str, bytes] = {}
        self._wanted: dict[str, Any] = {}
        client.subscribe_topic(client.id, self._hear)

    def expect(self, futures: Iterable[Any]) -> None:
        """Let these futures go as their results are told; some may have been told already."""
        self._wanted.update((str(future.key), future) for future in futures)
        for key in list(self._told):
            self._let_go(key)

    def is_told(self, future: Any) -> bool:
        """Return whether the result of `future`, which is cancelled then, is here and was not taken."""
        return str(future.key) in self._told

    def take(self, future: Any, look: Callable[[], object]) -> Any:
        """Return the result of a task that is done, or ask for it, and call `look` while it does not come.

        The task may be run again then: where `future` has failed or is cancelled in the end, its state says so, and
        this returns None, which no task does.
        """
        while True:
            without = future.status in _WITHOUT  # or let go by now, and told before that
            told = self._told.pop(str(future.key), None)
            if told is not None:
                return pickle.loads(told)
            if without:
                return None
            try:
                result = future.result(timeout=ASK_S)
            except TimeoutError:
                look()
            except Exception:
                if future.status not in _WITHOUT:
                    raise
            else:
                self._let_go(str(future.key))
                return result

    def take_told(self) -> Iterator[tuple[str, Any]]:
        """Yield the keys and results of what was told and not taken."""
        while self._told:
            key, told = self._told.popitem()
            yield key, pickle.loads(told)

    def close(self) -> None:
        """Hear nothing more: a scheduler says of a client that goes, too, that it goes."""
        if self._client.status == "running":
            self._client.unsubscribe_topic(self._client.id)

    def _hear(self, event: tuple[float, Any]) -> None:
        _, message = event
        if isinstance(message, dict) and "result" in message:  # and nothing that Dask itself says of the client
            self._told[message["key"]] = message["result"]
            self._let_go(message["key"])

    def _let_go(self, key: str) -> None:
        future = self._wanted.pop(key, None)
        if future is not None:
            future.release()
