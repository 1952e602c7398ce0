"""All that a Dask cluster tells of itself, as text: for tests of what must not be in it.

Schedulers can import this module, so what runs on them lives here.
"""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import cloudpickle
from distributed import Client, Scheduler


def dump_cluster(client: Client) -> dict[str, str]:
    """Return what scheduler and workers say when they are asked, by where it was."""
    info = client.scheduler_info(n_workers=-1)
    shown = {
        "tasks": client.run_on_scheduler(_dump_tasks).decode("latin-1"),
        "task stream": repr(client.get_task_stream()),
        "state": repr(client.run_on_scheduler(_dump_state)),
        "events": repr(client.get_events()),
        "scheduler log": repr(client.get_scheduler_logs()),
        "worker logs": repr(client.get_worker_logs()),
        "info": repr(info),
    }
    ports = [info["services"]["dashboard"], *(each["services"]["dashboard"] for each in info["workers"].values())]
    for port in ports:
        for path in ("/metrics", "/health"):
            shown[f"{port}{path}"] = _ask(port, path)
    shown["/metrics"] = "".join(shown[f"{port}/metrics"] for port in ports)
    shown.update(_walk(ports[0]))
    return shown


def _dump_tasks(dask_scheduler: Scheduler) -> bytes:
    """Return what the scheduler holds of each task, as it goes to workers."""
    return bytes(cloudpickle.dumps({key: task.run_spec for key, task in dask_scheduler.tasks.items()}))


def _dump_state(dask_scheduler: Scheduler) -> Any:
    """Return the scheduler as it describes itself, with all its tasks and their history."""
    return dask_scheduler._to_dict()


def _walk(port: int) -> Iterator[tuple[str, str]]:
    """Yield the scheduler's pages: JSON, and those that pages of HTML link to."""
    for path in ("/json/counts.json", "/json/identity.json", "/json/index.html"):
        yield path, _ask(port, path)
    seen: set[str] = set()
    left = ["/info/main/workers.html"]
    while left:
        path = left.pop()
        seen.add(path)
        text = _ask(port, path)
        yield path, text
        links = {f"/info/{link.removeprefix('../')}" for link in re.findall(r'href="(\.\./[^"]+html)"', text)}
        left += sorted(links - seen - set(left))


def _ask(port: int, path: str) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:  # of pages that Dask itself cannot show; what it says is looked at too
        return f"HTTP {error.code} {error.read().decode()}"
