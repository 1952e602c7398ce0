"""Clusters that are started on this machine: nobody else on it can use them, or read their pages."""

import importlib.util
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from distributed import Client
from runs.merging import plan_merge

from mergemill.engine import run
from mergemill.engine.recipe import ClusterFile, parse_cluster
from mergemill.engine.runs.clusters import probe
from mergemill.engine.runs.clusters.cluster import open_cluster, open_own
from mergemill.engine.runs.events import Event, Started
from mergemill.engine.runs.worker.workers import Workers

LOCAL = "kind: local\nworkers: 1\nmemory: 256MiB\n"

# What another user of the machine can try: one line a try, of what came of it.
INTRUDER = """
import asyncio, sys
from distributed.comm import connect
from distributed.security import Security

async def knock(address, security):
    args = security.get_connection_args("client") if security else {}
    try:
        comm = await connect(address, timeout=5, **args)
        await comm.write({"op": "identity", "reply": True})
        return f"in: {await comm.read()}"
    except Exception as error:
        return f"refused: {type(error).__name__}"

for place in sys.argv[1:]:
    print(place, "plain", asyncio.run(knock("tcp://" + place, None)))
    print(place, "another", asyncio.run(knock("tls://" + place, Security.temporary())))
"""


def _make_workers(text: str) -> Workers:
    return Workers(1, 1, 256 << 20, cluster=parse_cluster(text))


def _list_ports(client: Client) -> Mapping[str, list[str]]:
    """Return host and port of each door, by whose it is."""
    info = client.scheduler_info(n_workers=-1)
    doors = {
        "scheduler": [info["address"]],
        "worker": list(info["workers"]),
        "nanny": [each["nanny"] for each in info["workers"].values()],
    }
    return {name: [address.partition("://")[2] for address in found] for name, found in doors.items()}


def run_on(cluster: ClusterFile | None, family: Path, out: Path) -> Started:
    """Merge, and return what is told at the start."""
    events: list[Event] = []
    run(plan_merge("linear", family), out, workers=None if cluster else 1, cluster=cluster, on_event=events.append)
    return next(event for event in events if isinstance(event, Started))


def test_no_dashboard_is_told_of_where_there_is_none(family: Path, tmp_path: Path) -> None:
    assert run_on(None, family, tmp_path / "a").dashboard == ""
    assert run_on(parse_cluster(LOCAL), family, tmp_path / "b").dashboard == ""


def test_a_cluster_file_has_the_dashboard_where_it_says_so_and_bokeh_draws_it(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parse_cluster(f"{LOCAL}options: {{dashboard_address: '127.0.0.1:0'}}\n")
    if importlib.util.find_spec("bokeh") is None:
        assert run_on(file, family, tmp_path / "without").dashboard == ""
    monkeypatch.setattr(probe, "has_module", lambda name: name == "bokeh")
    seen = []

    def look(event: Event) -> None:
        if isinstance(event, Started):
            with urllib.request.urlopen(event.dashboard.replace("/status", "/health"), timeout=10) as answer:
                seen.append(answer.status)

    run(plan_merge("linear", family), tmp_path / "out", cluster=file, on_event=look)
    assert seen == [200]


def test_the_intruder_of_these_tests_gets_in_where_nothing_is_asked_for(tmp_path: Path) -> None:
    text = f"{LOCAL}options: {{protocol: tcp}}\n"
    with open_own(_make_workers(text), parse_cluster(text), "token", lambda waited_s: None) as crew:
        place = _list_ports(crew.client)["scheduler"][0]
        done = subprocess.run([sys.executable, "-c", INTRUDER, place], capture_output=True, text=True, check=True)
    assert f"{place} plain in: " in done.stdout


@pytest.fixture(scope="module", params=["--workers 2", "kind: local"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of a cluster that is started for a merge, either way."""
    if request.param == "kind: local":
        with open_own(_make_workers(LOCAL), parse_cluster(LOCAL), "token", lambda waited_s: None) as crew:
            crew.client.wait_for_workers(1, timeout=60)
            yield crew.client
        return
    with open_cluster(Workers(2, 1, 256 << 20)) as crew:
        crew.client.wait_for_workers(2, timeout=60)
        yield crew.client


@pytest.mark.parametrize("whose", ["scheduler", "worker", "nanny"])
def test_a_process_without_the_certificate_is_refused(client: Client, whose: str) -> None:
    places = _list_ports(client)[whose]
    done = subprocess.run([sys.executable, "-c", INTRUDER, *places], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(places)
    assert [line for line in lines if " refused: " not in line] == []
    assert client.submit(int, "3", pure=False).result(timeout=30) == 3  # and who has it goes on


def test_the_key_is_told_to_no_other_process(client: Client) -> None:
    key = str(client.security.tls_worker_key)
    middle = key.splitlines()[3]  # of its text
    assert "PRIVATE KEY" in key
    for process in psutil.Process().children(recursive=True):
        shown = " ".join(process.cmdline()) + repr(process.environ())
        assert middle not in shown


def test_no_page_is_served(client: Client) -> None:
    info = client.scheduler_info(n_workers=-1)
    ports = [info["services"]["dashboard"], *(each["services"]["dashboard"] for each in info["workers"].values())]
    for port in ports:
        for path in ("/status", "/info/main/workers.html", "/json/index.html", "/metrics", "/health"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10)
